"""One algorithm per file, written in the words of :mod:`nmsparse.cuda.tile` only."""
