"""Reading: files, TSV rows and tfds sets as streams of records, and shards of rows at random."""
