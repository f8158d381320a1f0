//! The command line as clap reads it; `docs/CLI.md` is generated from it.

use std::path::PathBuf;

use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};

/// Keeps the account data of two PostgreSQL sites the same.
#[derive(Debug, Parser)]
#[command(name = "sitepair", version, max_term_width = 110, after_help = EXAMPLES, arg_required_else_help = true)]
pub struct Cli {
    /// What every verb takes.
    #[command(flatten)]
    pub common: Common,
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

const EXAMPLES: &str = "\
Examples:
  sitepair demo                                      two throw-away sites, with proof
  sitepair --pipeline mssp.toml plan                 what deploy would do, and what stands in its way
  sitepair --pipeline mssp.toml deploy               install slot, publication, schema and grants
  sitepair --pipeline mssp.toml --site oulu run      the daemon of one site
  sitepair --pipeline mssp.toml status --watch       where each flow stands
  sitepair --pipeline mssp.toml pending --json       is there anything left to replicate?

Exit codes: 0 done; 1 failed; 2 usage or file error; 3 there is something (pending, blocking finding);
4 stopped by a guard (gap, lost slot, wrong identity, second reader or applier).";

/// Options that every verb takes.
#[derive(Debug, Clone, Args)]
pub struct Common {
    /// The pipeline file.
    #[arg(long, value_name = "FILE", env = "SITEPAIR_PIPELINE", global = true)]
    pub pipeline: Option<PathBuf>,
    /// Which site this node is; without it `run` plays every site.
    #[arg(long, value_name = "NAME", env = "SITEPAIR_SITE", global = true)]
    pub site: Option<String>,
    /// Only this flow, by name: `<pipeline>_[<lane>_]<from>_<to>`.
    #[arg(long, value_name = "NAME", global = true)]
    pub flow: Option<String>,
    /// One documented JSON object, or JSON lines, on stdout.
    #[arg(long, global = true)]
    pub json: bool,
    /// Form of the log on stderr.
    #[arg(long, value_enum, default_value_t = LogFormat::Text, value_name = "FORM", global = true)]
    pub log_format: LogFormat,
    /// Least level of the log: error, warn, info, debug, trace, or a tracing filter. Default: info for `run`, warn elsewhere.
    #[arg(long, value_name = "LEVEL", env = "SITEPAIR_LOG", global = true)]
    pub log_level: Option<String>,
}

/// Form of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// One line of text for each event.
    Text,
    /// One JSON object for each event.
    Json,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Two throw-away sites on this machine, a load, kills, and the proof that both agree.
    Demo(DemoArgs),
    /// What stands in the way, and what `deploy` would change; exit 3 if something blocks.
    Plan(OnlyArgs),
    /// Installs schema, roles' grants, publication, slot and origin. Repeatable.
    Deploy(DeployArgs),
    /// Removes what `deploy` installed. Repeatable.
    Undeploy(UndeployArgs),
    /// The daemon: reads the slot into the topic and applies the topic to the target.
    Run(RunArgs),
    /// Where each flow stands.
    Status(StatusArgs),
    /// Is there anything to replicate? Exit 0: proven nothing; 3: something; 1: unknown.
    Pending(PendingArgs),
    /// Where the checkpoint is; moves it.
    #[command(subcommand)]
    Offset(OffsetVerb),
    /// What was applied, set aside and done by hand.
    #[command(after_help = JOURNAL_EXAMPLES)]
    Journal(JournalArgs),
    /// Copies tables again, exactly; without --table the whole flow, which is made anew. The way out of a lost slot or a gap.
    Resync(ResyncArgs),
    /// Operations that could not be applied and were set aside.
    #[command(subcommand)]
    Parked(ParkedVerb),
    /// What is in the topic.
    #[command(subcommand)]
    Topic(TopicVerb),
    /// Takes a range of changes into a file, for a disk that is carried to the other site.
    #[command(after_help = EXPORT_EXAMPLES)]
    Export(ExportArgs),
    /// Brings in such a file: what is new in it is applied, and the network flow goes on behind it.
    #[command(after_help = IMPORT_EXAMPLES)]
    Import(ImportArgs),
}

const EXPORT_EXAMPLES: &str = "\
WHERE is an OFFSET (decimal), an LSN (X/Y), a TIME (RFC 3339 of the source's commit), earliest or latest. A TIME means the first
transaction in log order that committed at or after it. The range ends before --to.

Run it at the source's site: with `kind = \"peer\"` or \"kafka\" it reads the topic, with \"embedded\" (whose topic is at the other
site) the slot, confirming nothing; then the range is all that the target has not confirmed, and --from and --to are left out.
Overlap does no harm, a gap is refused by `import`. The file is signed by the key in `[export] key_file`.

Examples:
  sitepair --site helsinki export /mnt/disk/helsinki.parcel
  sitepair --site helsinki export --from 2026-11-21T09:30:00Z /mnt/disk/helsinki.parcel
  sitepair export --from 0/16B3748 --to 2026-11-21T12:00:00Z range.parcel";

/// Options of `export`.
#[derive(Debug, Clone, Args)]
pub struct ExportArgs {
    /// The first transaction. Default: the first that the target is not known to have.
    #[arg(long, value_name = "WHERE")]
    pub from: Option<String>,
    /// The first transaction that is left out. Default: latest.
    #[arg(long, value_name = "WHERE")]
    pub to: Option<String>,
    /// The file to write; it must not exist.
    pub file: PathBuf,
}

const IMPORT_EXAMPLES: &str = "\
Run it at the target's node, whether a daemon runs there or not. The whole file is checked before anything is changed; refused are
files that are damaged, cut off, forged, signed by another key, of another pipeline, flow or source, and those that begin behind
what is here. Importing a file twice, or what came by the network too, does no harm.

Examples:
  sitepair --site oulu import --dry-run /mnt/disk/helsinki.parcel      what is in it, and what it would do
  sitepair --site oulu import /mnt/disk/helsinki.parcel";

/// Options of `import`.
#[derive(Debug, Clone, Args)]
pub struct ImportArgs {
    /// The file.
    pub file: PathBuf,
    /// Check the file, say what is in it and what it would do, and change nothing.
    #[arg(long)]
    pub dry_run: bool,
}

/// Options of `demo`.
#[derive(Debug, Clone, Args)]
pub struct DemoArgs {
    /// How long the load runs, for example 8s.
    #[arg(long, default_value = "8s", value_name = "TIME", value_parser = humantime::parse_duration)]
    pub duration: std::time::Duration,
    /// Directory of PostgreSQL's server programs; default: PATH, then /usr/lib/postgresql/*/bin.
    #[arg(long, value_name = "DIR")]
    pub server: Option<PathBuf>,
}

/// Limits a verb to one site.
#[derive(Debug, Clone, Args)]
pub struct OnlyArgs {
    /// Act on this site alone.
    #[arg(long, value_name = "SITE")]
    pub only: Option<String>,
}

/// Options of `deploy`.
#[derive(Debug, Clone, Args)]
pub struct DeployArgs {
    /// Act on this site alone.
    #[arg(long, value_name = "SITE")]
    pub only: Option<String>,
    /// Print a psql script instead of doing it.
    #[arg(long)]
    pub print: bool,
    /// How long to wait for transactions that stand in the way.
    #[arg(long, default_value = "60s", value_name = "TIME", value_parser = humantime::parse_duration)]
    pub timeout: std::time::Duration,
}

/// Options of `undeploy`.
#[derive(Debug, Clone, Args)]
pub struct UndeployArgs {
    /// Act on this site alone.
    #[arg(long, value_name = "SITE")]
    pub only: Option<String>,
    /// Drop the journal and parked operations too, without asking.
    #[arg(long)]
    pub yes: bool,
}

/// Options of `run`.
#[derive(Debug, Clone, Args)]
pub struct RunArgs {
    /// Run the reader only (both without --reader and --applier).
    #[arg(long)]
    pub reader: bool,
    /// Run the applier only.
    #[arg(long)]
    pub applier: bool,
    /// End when everything that the source had flushed at the start is applied (with --reader: durable in the topic;
    /// with --applier: everything that the topic held at the start is applied).
    #[arg(long)]
    pub once: bool,
}

/// Options of `status`.
#[derive(Debug, Clone, Args)]
pub struct StatusArgs {
    /// Show it anew every two seconds until Ctrl-C.
    #[arg(long)]
    pub watch: bool,
}

/// Options of `pending`.
#[derive(Debug, Clone, Args)]
pub struct PendingArgs {
    /// How long to wait for the running reader to catch up with the position noted.
    #[arg(long, default_value = "10s", value_name = "TIME", value_parser = humantime::parse_duration)]
    pub timeout: std::time::Duration,
}

/// Verbs of `offset`.
#[derive(Debug, Subcommand)]
pub enum OffsetVerb {
    /// Where the checkpoint is, and from where to where it can be set.
    Show,
    /// Sets the checkpoint: back to apply changes again, forward to skip them.
    #[command(after_help = RESET_EXAMPLES)]
    Reset(ResetArgs),
    /// Applies changes again.
    #[command(after_help = REPLAY_EXAMPLES)]
    Replay(ReplayArgs),
}

const RESET_EXAMPLES: &str = "\
WHERE is an OFFSET (decimal), an LSN (X/Y), a TIME (RFC 3339 of the source's commit), earliest or latest.
An LSN means the first transaction that ends after it, a TIME the first one in log order that committed at or after it.
An offset inside a transaction means that transaction's first record.

Examples:
  sitepair offset reset --to 2026-11-21T09:30:00Z --dry-run     what would be applied again
  sitepair offset reset --to 2026-11-21T09:30:00Z               apply it again
  sitepair offset reset --to latest --reason \"test data\"       skip what is not applied yet, for ever

Safe while `run` is running and while it is not. After a step back the target shows older rows until it has caught up:
`status` says from which position on it is consistent again.";

const REPLAY_EXAMPLES: &str = "\
WHERE is an OFFSET (decimal), an LSN (X/Y), a TIME (RFC 3339 of the source's commit) or earliest, as for `offset reset`.

Without --to the checkpoint goes back to --from, and everything is applied again from there on.
With --to the checkpoint stays, and [--from, --to) is applied again for the rows that nothing behind it changes; the answer
says what is left out and why. It happens in one transaction at the target: whole, or not at all.

Examples:
  sitepair offset replay --from 2026-11-21T09:30:00Z --dry-run
  sitepair offset replay --from 2026-11-21T09:30:00Z --to 2026-11-21T10:00:00Z --dry-run";

/// Options of `offset reset`.
#[derive(Debug, Clone, Args)]
pub struct ResetArgs {
    /// The next record to apply.
    #[arg(long, value_name = "WHERE")]
    pub to: String,
    /// Why; the journal keeps it. A step forward needs one.
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,
    /// Say what it would touch, and change nothing.
    #[arg(long)]
    pub dry_run: bool,
}

/// Options of `offset replay`.
#[derive(Debug, Clone, Args)]
pub struct ReplayArgs {
    /// The first record to apply again.
    #[arg(long, value_name = "WHERE")]
    pub from: String,
    /// The first record that is not applied again; the checkpoint stays where it is.
    #[arg(long, value_name = "WHERE")]
    pub to: Option<String>,
    /// With --to and --reason: apply changes of rows that were changed again since, too. Such rows are left with values
    /// older than the source's.
    #[arg(long, requires = "to")]
    pub allow_older_values: bool,
    /// Why; the journal keeps it.
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,
    /// Say what it would touch, and change nothing.
    #[arg(long)]
    pub dry_run: bool,
}

const JOURNAL_EXAMPLES: &str = "\
Entries are groups of transactions (g12), operations that were not simply applied (o3) and what operators did (e7).

Examples:
  sitepair journal --since 2026-11-21T09:00:00Z         everything since then
  sitepair journal --failed                             what was parked or skipped
  sitepair journal --table public.account --key 4711    one row's operations
  sitepair journal show g12                             a group with its operations";

/// Options of `journal`.
#[derive(Debug, Clone, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct JournalArgs {
    /// What else.
    #[command(subcommand)]
    pub verb: Option<JournalVerb>,
    /// Only what was parked or skipped.
    #[arg(long)]
    pub failed: bool,
    /// Only groups of this status; without it those that only note progress are left out.
    #[arg(long, value_name = "STATUS", value_parser = ["adopted", "applied", "parked", "progress", "moved"])]
    pub status: Option<String>,
    /// Only what touches this table, as schema.table.
    #[arg(long, value_name = "TABLE")]
    pub table: Option<String>,
    /// Only operations on the row with this key: its text, or a JSON array of texts.
    #[arg(long, value_name = "KEY")]
    pub key: Option<String>,
    /// Only what is not older than this, RFC 3339, by the target's clock.
    #[arg(long, value_name = "TIME")]
    pub since: Option<String>,
    /// So many of the newest.
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub limit: u32,
}

/// Verbs of `journal`.
#[derive(Debug, Clone, Subcommand)]
pub enum JournalVerb {
    /// One entry with all that belongs to it.
    Show {
        /// Its id, as `journal` prints it: g12, o3, e7.
        id: String,
    },
}

/// Options of `resync`.
#[derive(Debug, Clone, Args)]
pub struct ResyncArgs {
    /// Only this table, as schema.table; may be given more than once. The flow goes on for the others.
    #[arg(long, value_name = "TABLE")]
    pub table: Vec<String>,
    /// Do it without asking.
    #[arg(long)]
    pub yes: bool,
    /// Why; the journal keeps it. Needed without --table.
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,
    /// How long to wait for transactions that the new slot waits behind.
    #[arg(long, default_value = "60s", value_name = "TIME", value_parser = humantime::parse_duration)]
    pub timeout: std::time::Duration,
}

const RETRY_EXAMPLES: &str = "\
An operation never overtakes an older one of the same key or unique value: retry or drop that one first, or take --all.

Examples:
  sitepair parked retry --all --reason \"the check constraint is gone\"
  sitepair parked retry 3 5 --reason \"mended\"";

/// Verbs of `parked`.
#[derive(Debug, Clone, Subcommand)]
pub enum ParkedVerb {
    /// All of them, oldest first.
    List,
    /// One with its image and error.
    Show {
        /// Its number.
        id: i64,
    },
    /// Applies them again, oldest first; exit 1 when one still can't be.
    #[command(after_help = RETRY_EXAMPLES)]
    Retry(RetryArgs),
    /// Gives them up: the sites stay different there. The journal keeps their images.
    Drop(DropArgs),
    /// Changes values, before a retry.
    Edit(EditArgs),
}

/// Options of `parked retry`.
#[derive(Debug, Clone, Args)]
pub struct RetryArgs {
    /// Which.
    #[arg(required_unless_present = "all")]
    pub ids: Vec<i64>,
    /// All of them.
    #[arg(long, conflicts_with = "ids")]
    pub all: bool,
    /// Why; the journal keeps it.
    #[arg(long, value_name = "TEXT")]
    pub reason: String,
}

/// Options of `parked drop`.
#[derive(Debug, Clone, Args)]
pub struct DropArgs {
    /// Which.
    #[arg(required = true)]
    pub ids: Vec<i64>,
    /// Why; the journal keeps it.
    #[arg(long, value_name = "TEXT")]
    pub reason: String,
}

/// Options of `parked edit`.
#[derive(Debug, Clone, Args)]
#[command(group(ArgGroup::new("values").args(["set", "set_null"]).required(true).multiple(true)))]
pub struct EditArgs {
    /// Which.
    pub id: i64,
    /// A column's new value, in PostgreSQL's text form.
    #[arg(long = "set", value_name = "COLUMN=VALUE")]
    pub set: Vec<String>,
    /// A column that becomes NULL.
    #[arg(long = "set-null", value_name = "COLUMN")]
    pub set_null: Vec<String>,
    /// Why; the journal keeps it.
    #[arg(long, value_name = "TEXT")]
    pub reason: String,
}

/// Verbs of `topic`.
#[derive(Debug, Subcommand)]
pub enum TopicVerb {
    /// Size, bounds and times.
    Info,
    /// The records, a JSON object a line.
    Cat(CatArgs),
    /// Reads everything: checksums, the chain of positions, whole transactions. Exit 4 names the first damage.
    Verify,
}

/// Options of `topic cat`.
#[derive(Debug, Clone, Args)]
pub struct CatArgs {
    /// First record: an OFFSET (decimal), an LSN (X/Y) or a TIME (RFC 3339).
    #[arg(long, value_name = "WHERE")]
    pub from: Option<String>,
    /// End, not included: an OFFSET, an LSN or a TIME.
    #[arg(long, value_name = "WHERE")]
    pub to: Option<String>,
    /// Only transactions that touch this table, as schema.table.
    #[arg(long, value_name = "TABLE")]
    pub table: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn common_options_stand_before_or_after_the_verb() {
        for line in ["sitepair --json --pipeline a.toml pending", "sitepair pending --pipeline a.toml --json"] {
            let cli = Cli::try_parse_from(line.split(' ')).expect(line);
            assert!(cli.common.json && cli.common.pipeline.is_some());
        }
    }
}
