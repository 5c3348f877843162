"""The training stages: labelled data and policies in, an adapter out."""
