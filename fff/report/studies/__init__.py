"""Layouts of single studies: one module each, named like the study, with `report(data) -> Report`."""
