"""Compose the rooms: what a user calls. One file per public verb; `lading` lists their names."""
