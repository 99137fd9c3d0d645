"""Data sets: prepared clips of videos with captions, and procedural clips."""
