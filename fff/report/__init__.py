"""Run records to tables and figures: records -> tidy CSV -> cells -> Markdown, LaTeX, SVG, PNG; imports no torch."""
