"""Text of users and servers, as it may be printed, stored and logged."""
