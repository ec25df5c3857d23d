"""These ops under other programs. Each module needs the program it is named after, and no other."""
