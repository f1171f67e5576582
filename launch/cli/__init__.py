"""The avcil command: thin functions around the library."""
