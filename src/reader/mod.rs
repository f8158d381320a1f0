//! F3: slot to topic.
