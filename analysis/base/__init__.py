"""What all analyses share: arguments by name, checks, order of records, BLAS threads."""
