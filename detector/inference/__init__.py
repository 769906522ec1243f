"""Apply a trained detector to pictures and write what it found: PNG files and one HTML page."""
