"""What the loader is measured against, and how."""
