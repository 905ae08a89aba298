"""Components as pytrees, numbers, progress bars."""
