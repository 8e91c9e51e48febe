"""The tune methods, one file each."""
