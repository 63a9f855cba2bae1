"""Files from outside and threads: checked reading, with sentences for what is wrong, and a lock for objects that several threads call."""
