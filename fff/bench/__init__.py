"""Timing a callable and counting its operations and bytes, with outputs compared before anything is timed."""
