//! Everything that can go wrong, as one catalogue: each code says what class it is of and what the operator does next.

use std::fmt;

/// The result of anything that can end in a [`Fault`].
pub type Result<T> = std::result::Result<T, Fault>;

/// What a fault means for the flow and for the exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    /// Exit 2: the call or the pipeline file is wrong; nothing was touched.
    Usage,
    /// Exit 1: it can't work as things are (credentials, rights, settings, a data error under `on_error = "stop"`).
    Failed,
    /// Exit 4: a guard stopped the flow because going on could lose or distort data.
    Guard,
    /// Retried for ever, visibly: a server that can't be reached, a lock, a serialization failure.
    Transient,
}

impl Class {
    /// The exit code; a transient fault that ends a command (with `--once`, or a one-shot verb) counts as failed.
    pub fn exit_code(self) -> u8 {
        match self {
            Class::Usage => 2,
            Class::Failed | Class::Transient => 1,
            Class::Guard => 4,
        }
    }
}

/// Writes the enum, its list and its exhaustive tables from one table, so that no code can lack a class or a remedy.
macro_rules! codes {
    ($($(#[doc = $doc:literal])+ $variant:ident = $name:literal, $class:ident, $remedy:literal;)+) => {
        /// The catalogue of faults (`docs/ERRORS.md` is generated from it).
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Code {
            $($(#[doc = $doc])+ $variant,)+
        }

        impl Code {
            /// All codes, in the order of the catalogue.
            pub const ALL: &'static [Code] = &[$(Code::$variant),+];

            /// The name that messages show and that documentation is searched by.
            pub fn name(self) -> &'static str {
                match self { $(Code::$variant => $name),+ }
            }

            /// What the fault means for the flow.
            pub fn class(self) -> Class {
                match self { $(Code::$variant => Class::$class),+ }
            }

            /// What the operator does next, where the place that raised the fault knows nothing more exact.
            pub fn remedy(self) -> &'static str {
                match self { $(Code::$variant => $remedy),+ }
            }

            /// Why it happens, for the catalogue.
            pub fn cause(self) -> &'static str {
                match self { $(Code::$variant => concat!($($doc),+)),+ }
            }
        }
    };
}

codes! {
    /// A command line that does not say what to do, or names what does not exist.
    Usage = "usage", Usage, "see `sitepair --help`";
    /// The pipeline file can't be read, parsed, or means something impossible.
    BadFile = "bad-file", Usage, "correct the places named and run `sitepair plan`";
    /// A password file, certificate or environment variable that the pipeline file names can't be used.
    BadSecret = "bad-secret", Usage, "make the file readable for this user, or set the variable";
    /// A row filter that can't be evaluated exactly as PostgreSQL would.
    BadFilter = "bad-filter", Usage, "rewrite the `where` with the operators that docs/RULES.md lists";

    /// A server can't be reached, or a connection broke.
    Unreachable = "unreachable", Transient, "nothing to do if the site is down on purpose; else check host, port and network";
    /// The server is starting, stopping, in recovery, or out of connections.
    ServerBusy = "server-busy", Transient, "wait; if it lasts, look at the server's log and max_connections";
    /// The walsender ended the stream with an error of its own; the same error at the same position three times is
    /// `poison-wal`.
    DecodeFailed = "decode-failed", Transient, "nothing, the stream is opened again; if it lasts, look at the server's log";
    /// A server's disk is full.
    ServerDiskFull = "server-disk-full", Transient, "free space on that server's disk; the flow goes on by itself";
    /// A deadlock, lock timeout or serialization failure; the transaction is tried again.
    Contention = "contention", Transient, "nothing, it is tried again; if it lasts, look for long transactions at the site";

    /// The server refused the login.
    BadCredentials = "bad-credentials", Failed, "check user, password_file and pg_hba.conf";
    /// TLS could not be set up as sslmode asks.
    BadTls = "bad-tls", Failed, "check sslmode, sslrootcert and the server's certificate";
    /// A right is missing.
    MissingRight = "missing-right", Failed, "run `sitepair plan`: it prints the GRANT";
    /// A server setting does not allow logical replication.
    BadSetting = "bad-setting", Failed, "change the setting named, restart the server, run `sitepair plan`";
    /// The preflight found something that blocks.
    Blocked = "blocked", Failed, "resolve the blocking findings of `sitepair plan`";
    /// The pipeline is not installed at a site.
    NotDeployed = "not-deployed", Failed, "run `sitepair deploy`";
    /// A statement failed for a reason that is not in the data.
    Sql = "sql", Failed, "look at the server's log for the statement";
    /// A change could not be applied and `on_error` is `stop`.
    DataError = "data-error", Failed, "mend the cause at the target and start again, or set on_error = \"park\"";
    /// A row is larger than `max_row`.
    RowTooLarge = "row-too-large", Failed, "raise apply.max_row in the pipeline file, and see docs/OPERATING.md for the memory it needs";
    /// A TRUNCATE arrived and the rule says `truncate = "stop"`.
    TruncateStop = "truncate-stop", Failed, "decide: set truncate = \"apply\" or \"ignore\" for the rule and start again";
    /// The target lacks a table or a column that the record carries.
    ShapeMismatch = "shape-mismatch", Failed, "run the ALTER TABLE named at the target, then start again";
    /// The publication sends a table that no rule selects.
    UnknownRelation = "unknown-relation", Failed, "run `sitepair deploy`, which makes the publication agree with the pipeline file";
    /// A table has no key that can name its rows at both ends.
    NoKey = "no-key", Failed, "add a primary key, or exclude the table";
    /// A value is not valid UTF-8, so it can't be carried faithfully.
    BadEncoding = "bad-encoding", Failed, "correct the value at the source; a SQL_ASCII database must hold UTF-8 only";
    /// A file or directory can't be read or written.
    Io = "io", Failed, "check path, owner and free space";
    /// The disk that holds the topic is full.
    DiskFull = "disk-full", Failed, "free space on the topic's disk and start again; nothing was lost";
    /// The topic reached `retention.max_bytes` with nothing that may be dropped.
    TopicFull = "topic-full", Transient, "start the applier or raise retention.max_bytes; the reader waits";
    /// The answer did not come within the time allowed.
    Timeout = "timeout", Failed, "raise --timeout, or look at what the command waits behind";
    /// The operation was interrupted by a signal.
    Interrupted = "interrupted", Failed, "run it again";

    /// The slot is gone or was invalidated.
    SlotLost = "slot-lost", Guard, "changes may be missing: run `sitepair resync --reason \"slot lost\"`";
    /// The publication did not exist when a change was decoded, so the server left changes out or stopped.
    PublicationLost = "publication-lost", Guard, "changes may be missing: run `sitepair resync --reason \"publication lost\"`";
    /// The slot is not the one that this pipeline made (plugin, database, two_phase, or flow_id differ).
    ForeignSlot = "foreign-slot", Guard, "find out who recreated the slot; then run `sitepair resync --reason \"slot replaced\"`";
    /// The slot has moved past the topic's durable end, so transactions are missing.
    Gap = "gap", Guard, "changes are missing: run `sitepair resync --reason \"gap\"`";
    /// The source is not the cluster that the topic came from, or went back in time (restored from a backup).
    SourceChanged = "source-changed", Guard, "if the source was restored or replaced on purpose, run `sitepair resync --reason \"source replaced\"`";
    /// The source moved to a timeline that does not contain all that the topic holds.
    TimelineFork = "timeline-fork", Guard, "the topic holds transactions that the new primary never had: run `sitepair resync --reason \"timeline fork\"`";
    /// The checkpoint at the target belongs to another flow.
    ForeignCheckpoint = "foreign-checkpoint", Guard, "the target was restored or belongs to another pipeline: run `sitepair resync --reason \"target restored\"`";
    /// The peer serves another pipeline's topic, or none of this flow.
    ForeignPeer = "foreign-peer", Guard, "check url, and that both nodes run the same pipeline file after its last `sitepair deploy`";
    /// Another applier moved the checkpoint.
    CheckpointMoved = "checkpoint-moved", Guard, "only one applier may run for a flow: stop the other one";
    /// A second reader: the slot is in use.
    SecondReader = "second-reader", Guard, "only one reader may run for a flow: stop the other one";
    /// A second applier: the origin is in use.
    SecondApplier = "second-applier", Guard, "only one applier may run for a flow: stop the other one";
    /// A second writer appended to the topic, or this one was fenced.
    Fenced = "fenced", Guard, "only one reader may write a topic: stop the other one";
    /// The chain of positions in the topic is broken: it was recreated, truncated, rewound or mixed (P9).
    BrokenChain = "broken-chain", Guard, "the topic is not the one that this flow wrote: run `sitepair resync --reason \"broken chain\"`";
    /// What the topic needs to go on was dropped by retention, or the applier asks for what it never held.
    TopicGap = "topic-gap", Guard, "changes are missing from the topic: run `sitepair resync --reason \"topic gap\"`";
    /// A record or the topic's file is damaged.
    TopicDamaged = "topic-damaged", Guard, "restore the topic's disk if you can; else run `sitepair resync --reason \"topic damaged\"`";
    /// An exported file is cut off or damaged.
    ParcelDamaged = "parcel-damaged", Guard, "nothing was changed: copy the file again, or export the range again";
    /// An exported file was not written by the owner of the key.
    ParcelForged = "parcel-forged", Guard, "nothing was changed: find out who had the file in hands, and export the range again";
    /// An exported file is of another pipeline, flow, source or key.
    ParcelForeign = "parcel-foreign", Guard, "nothing was changed: import it where it belongs, by the pipeline file that exported it";
    /// The replication stream held something that the protocol does not allow.
    BadStream = "bad-stream", Guard, "report it with the server's version; nothing past it was confirmed";
    /// The server's walsender fails at one position again and again (P7).
    PoisonWal = "poison-wal", Guard, "the transaction at that position can't be decoded: run `sitepair resync --reason \"poison wal\"`";
}

/// Something that went wrong: a code, and what it was about in this case.
///
/// Shown as one line: `error[slot-lost]: what; remedy`. Never holds a secret or a row's values, but for the key of a row
/// that could not be applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// What kind of fault.
    pub code: Code,
    /// What happened and where: one line, no full stop.
    pub what: String,
    /// A remedy more exact than the catalogue's.
    pub remedy: Option<String>,
}

impl Fault {
    /// A fault with the catalogue's remedy.
    pub fn new(code: Code, what: impl Into<String>) -> Self {
        Self { code, what: what.into(), remedy: None }
    }

    /// The same fault with a remedy for this very case.
    #[must_use]
    pub fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }

    /// The same fault, saying first where it happened (a site, a flow, a file).
    #[must_use]
    pub fn at(mut self, place: impl fmt::Display) -> Self {
        self.what = format!("{place}: {}", self.what);
        self
    }

    /// What it means for the flow.
    pub fn class(&self) -> Class {
        self.code.class()
    }

    /// True when it is worth trying again without anybody doing anything.
    pub fn is_transient(&self) -> bool {
        self.class() == Class::Transient
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let remedy = self.remedy.as_deref().unwrap_or_else(|| self.code.remedy());
        let line = format!("error[{}]: {}; {remedy}", self.code.name(), self.what);
        f.write_str(&line.replace(['\n', '\r'], " "))
    }
}

impl std::error::Error for Fault {}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn each_code_has_a_name_of_its_own_and_a_remedy() {
        let names: BTreeSet<_> = Code::ALL.iter().map(|code| code.name()).collect();
        assert_eq!(names.len(), Code::ALL.len());
        for code in Code::ALL {
            assert!(!code.remedy().is_empty() && !code.cause().is_empty(), "{code:?}");
        }
    }

    #[test]
    fn a_fault_is_one_line() {
        let fault = Fault::new(Code::SlotLost, "slot \"x\"\nis gone").at("site a");
        assert_eq!(
            fault.to_string(),
            "error[slot-lost]: site a: slot \"x\" is gone; changes may be missing: run `sitepair resync --reason \"slot lost\"`"
        );
    }
}
