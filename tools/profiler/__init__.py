"""tools/profile_pipeline.py's own half: stages, loaders and training measured, and what they say to change."""
