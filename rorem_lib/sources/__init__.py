"""Raw data as its publishers distribute it, an importer a file; `registry` lists them."""
