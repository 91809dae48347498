"""The passes that come with accelx: one a file."""
