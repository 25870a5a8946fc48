"""Where Services and their endpoints come from: one file a source, all publishing `model.Snapshot`."""
