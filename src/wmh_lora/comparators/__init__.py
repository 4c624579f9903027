"""Other methods, trained and scored by the same pipeline on the same scans."""
