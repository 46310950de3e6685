"""Hours of footage to clips: cuts, scores, duplicates."""
