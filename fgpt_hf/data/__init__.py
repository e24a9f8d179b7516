"""Turn documents, conversations and preference pairs into batches."""
