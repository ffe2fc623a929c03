"""Dataset classes whose samples take pictures in and give pictures out."""
