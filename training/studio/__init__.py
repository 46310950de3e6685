"""The app in a browser: clips and captions, the commands of a run, the process that runs them, and the page."""
