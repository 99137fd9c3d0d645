"""Data sets: videos and captions into prepared clips, and the procedural clips that nano learns from."""
