"""One HTML page that shows what a patch or a benchmark did, for people to look at before they ship it."""
