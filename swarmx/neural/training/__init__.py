"""Training, with torch: needs the extra `train`; nothing on the serving path imports it."""
