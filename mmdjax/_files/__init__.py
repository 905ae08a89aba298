"""Files: whole or not at all, locked, hashed, told apart."""
