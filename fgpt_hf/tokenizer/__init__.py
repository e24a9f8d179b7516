"""Turn text and conversations into token ids."""
