"""A mixer that is new: its skeleton, and where it stands on the frontier of recall against bytes of state."""
