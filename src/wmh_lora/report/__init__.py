"""What a run leaves behind: tables, pictures, and the files of one scan."""
