"""What preparation met in the raw logs, counted; kept in the manifest."""

from dataclasses import dataclass


@dataclass
class Report:
    """Counts of one preparation. Rows are rows of the log; events are what is left of them."""

    rows_read: int = 0
    bad_rows_dropped: int = 0  # null ids, unreadable values
    zero_duration: int = 0  # rows, stored as 0
    negative_times: int = 0  # rows whose watch or duration time is below 0, stored as unknown
    unsorted: int = 0  # rows with a lower timestamp than the row before of the same user in the files' order
    duplicates: int = 0  # repeats of an earlier (user, item, timestamp, behaviour)
    duplicates_dropped: int = 0
    ties: int = 0  # events with the timestamp of the event before of the same user, after dropping duplicates
    users_dropped: int = 0  # users of fewer than min_user_events events
    events_dropped: int = 0  # their events
    bad_items_dropped: int = 0  # rows of the item file without an id
    duplicate_items_dropped: int = 0  # rows of the item file whose id came before
    items_not_in_file: int = 0  # items of the log that the item file lacks
    bad_users_dropped: int = 0  # rows of the user file without an id
    duplicate_users_dropped: int = 0  # rows of the user file whose id came before
    users_not_in_file: int = 0  # users of the log that the user file lacks
    unknown_items: int = 0  # of an append: rows of items that the folder lacks, which have no SID
    known_events: int = 0  # of an append: events that the folder has already
    new_users: int = 0  # of an append: users of whom nothing was known
    late_events: int = 0  # of an append: new events that are older than the newest one known of their user
