"""Point sets: what they are, their distances, and how they are read in blocks, from the host and over a mesh."""
