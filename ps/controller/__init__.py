"""The controller: what changes the view and keeps the servers running (see actor)."""
