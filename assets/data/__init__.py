"""Raw tables to the dataset and its graph."""
