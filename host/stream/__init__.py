"""One pass from noise to a video file, which may be cut off and resumed."""
