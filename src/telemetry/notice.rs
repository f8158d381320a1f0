//! What the log says at WARN and ERROR, in one table: `notice` of each such line is a name of it, and `docs/ERRORS.md`
//! lists them all. A test finds a line that has none.

/// How much a notice matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// Somebody should look, some time.
    Warn,
    /// Somebody has to act.
    Error,
}

/// A line of the log.
#[derive(Debug, Clone, Copy)]
pub struct Notice {
    /// Its name, the field `notice`.
    pub name: &'static str,
    /// Its level.
    pub level: Level,
    /// What it says, and why.
    pub cause: &'static str,
    /// What the operator does.
    pub remedy: &'static str,
}

macro_rules! notices {
    ($($constant:ident = $name:literal, $level:ident, $cause:literal, $remedy:literal;)+) => {
        $(#[doc = $cause] pub const $constant: &str = $name;)+

        /// All notices, in the order of the documentation.
        pub const NOTICES: &[Notice] = &[
            $(Notice { name: $name, level: Level::$level, cause: $cause, remedy: $remedy }),+
        ];
    };
}

notices! {
    FLOW_STOPPED = "flow-stopped", Error, "A flow ended by a fault that no attempt can mend; the others go on.", "do what the fault's remedy says, then start `sitepair run` again";
    TRYING_AGAIN = "trying-again", Warn, "A part of a flow ended by a fault that passes by itself, and begins anew after a pause.", "nothing, unless it lasts: then see the fault";
    GIVEN_UP = "given-up", Warn, "What was under way when the daemon was told to stop did not end in time.", "nothing: the next start does it again";
    WAL_NEAR = "wal-near", Warn, "The WAL that a slot holds back is four fifths of what a bound allows, or nobody reads the slot and less than an hour is left.", "see `sitepair status`; start what reads the slot, or mend what it waits for: docs/runbooks/wal.md";
    WAL_LIMIT = "wal-limit", Error, "The WAL that a slot holds back has reached a bound: wal.limit, max_slot_wal_keep_size or the disk.", "act as docs/runbooks/wal.md says";
    SLOT_DROPPED = "slot-dropped", Error, "The slot held back more than wal.limit, and wal.on_limit is \"drop-slot\".", "mend what kept the slot from being read; then run `sitepair resync --reason \"slot dropped\"`";
    SLOT_DROP_UNNOTED = "slot-drop-unnoted", Warn, "The slot is dropped, and who did it could not be noted at the source.", "run `sitepair deploy`: an earlier version installed the schema there";
    TOPIC_FULL = "topic-full", Warn, "The topic has reached retention.max_bytes with nothing that may be dropped; the reader waits, and WAL piles up at the source.", "start what applies, or raise topic.retention.max_bytes";
    UNAPPLIED_DROPPED = "unapplied-dropped", Warn, "The topic was full, and topic.on_full is \"drop-unapplied\": records that nobody had applied are gone.", "run `sitepair resync --reason \"topic gap\"`";
    SPACE_KEPT = "space-kept", Warn, "The file of the topic could not give the space of dropped records back; it is used again for new ones.", "look at the disk, or run `sitepair topic verify`";
    TOPIC_WAL_GROWS = "topic-wal-grows", Warn, "The log beside the topic's file could not be taken into it, so it grows.", "look at the disk; see whether something reads the file for long";
    SPOOLING = "spooling", Warn, "Kafka does not take records; the reader keeps them in topic.spool until it does.", "nothing, unless it lasts: then see the fault, and the room below topic.spool_max";
    SPOOL_FULL = "spool-full", Warn, "Neither Kafka nor the spool takes records; the reader waits.", "bring Kafka back, or raise topic.spool_max";
    FORWARDING_WAITS = "forwarding-waits", Warn, "Kafka answers, and what is in the spool can't go there for a reason that somebody has to mend, such as a transaction that its broker left open.", "do what the fault's remedy says; records stay in the spool until then";
    SPOOL_ASIDE = "spool-aside", Warn, "A spool that does not belong to the flow as it is now was moved aside.", "look at the file that is named; remove it if nobody needs it";
    TRUNCATE_IGNORED = "truncate-ignored", Warn, "A TRUNCATE at the source was left out, as the rule says; the sites differ.", "nothing; or `sitepair resync --table` to make the table the same";
    TABLE_PAUSED = "table-paused", Warn, "A table at the target does not fit its changes. Only this table waits.", "run the statement that the fault names: docs/runbooks/drift.md";
    COPY_WAITS = "copy-waits", Warn, "A table at the target does not fit what is to be copied. Only this table waits.", "run the statement that the fault names; the copy begins by itself";
    COPY_FAILED = "copy-failed", Warn, "A copy through the topic can't go on at the source's node; it is tried again.", "see the fault; the rest of the flow goes on";
    COPY_LEFT_OUT = "copy-left-out", Warn, "The topic brings a table that the file of the target's node does not name, or names in another lane. Nothing more of it is taken.", "nothing, if the table left the files of both nodes; else name it in this file too, and run `sitepair resync --table` at the source's node";
    GROUP_FAILS = "group-fails", Warn, "An operation of a group of transactions can't be applied; they are tried one by one.", "see the next lines: what can't be applied stops the flow or is parked";
    PARKED = "parked", Warn, "An operation can't be applied and was set aside, as apply.on_error says.", "see `sitepair parked list` and docs/runbooks/parked.md";
    OLD_TRANSACTIONS = "old-transactions", Warn, "A slot or a copy waits until transactions that ran before have ended.", "end the sessions that are named, or wait";
    SLOT_LEFT = "slot-left", Warn, "The creation of a slot was given up, and the server goes on with it.", "nothing: the next deploy drops it";
    CUT_UNNOTICED = "cut-unnoticed", Warn, "An export waits until the source's server has noticed that the connection of the reader is gone.", "nothing, unless it lasts: then end the walsender, or stop the reader";
    REQUEST_FAILED = "request-failed", Warn, "What a command asked of the daemon could not be done; nothing has changed.", "the command shows the same fault with its remedy";
    RETENTION_FAILED = "retention-failed", Warn, "Old records of the topic, or old entries of the journal, could not be dropped.", "see the fault; it is tried again";
    TABLES_UNKNOWN = "tables-unknown", Warn, "The source does not say which tables the flow has; those that are known go on.", "see the fault: mostly a right at the source";
    TABLES_OUTSIDE = "tables-outside", Warn, "The rules match tables at the source that the flow does not have. They are not replicated yet; the others are.", "run `sitepair plan`, make the tables at the target as it says, then `sitepair deploy`";
    SOURCE_OUT_OF_REACH = "source-out-of-reach", Warn, "The target's node does not reach the source's database, so no table is copied.", "open the way to the source's database for this node";
    PEER_UNTOLD = "peer-untold", Warn, "The source's node could not be told what is applied; it keeps the records.", "see the fault; it is tried again";
    STREAM_ENDS = "stream-ends", Warn, "A topic that a peer pulls could not be read on.", "see the fault; the peer shows it too";
    NOT_ACCEPTED = "not-accepted", Warn, "A connection to `listen` could not be accepted.", "look at the number of open files and connections";
    SERVER_SAYS = "server-says", Warn, "A server sent a warning of its own.", "see the text and its SQLSTATE";
}
