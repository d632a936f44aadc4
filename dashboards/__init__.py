"""Queries over finished studies, figures, the static report and the web app."""
