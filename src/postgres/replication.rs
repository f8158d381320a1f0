//! A walsender connection: commands (PostgreSQL manual, section 55.4) and queries, then the stream.

use std::io;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use postgres_protocol::message::backend::{DataRowBody, ErrorFields, Message};
use postgres_protocol::message::frontend;
use tokio_postgres::fallible_iterator::FallibleIterator;

use super::channel::{self, Channel};
use super::dial::Purpose;
use super::gather::Road;
use super::login::{self, error_fields};
use super::slot;
use super::sqlstate;
pub use super::stream::Stream;
use crate::config::ConnInfo;
use crate::model::names::{quote_ident, quote_literal};
use crate::model::{Code, Fault, Lsn, Result};

/// CopyBothResponse, which postgres-protocol does not know.
const COPY_BOTH_RESPONSE: u8 = b'W';

/// A walsender that is idle.
pub struct Replication {
    channel: Channel,
    version: u32,
    backend_pid: u32,
    road: Road,
    place: String,
}

/// The answer to IDENTIFY_SYSTEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SystemIdentity {
    /// Names the cluster and its physical copies.
    pub system_id: u64,
    /// Current timeline.
    pub timeline: u32,
    /// Flushed position; at a standby, what it has replayed.
    pub xlogpos: Lsn,
    /// The database that this connection decodes.
    pub dbname: String,
}

/// One line of a timeline's history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TimelineSwitch {
    /// The timeline that was left.
    pub timeline: u32,
    /// Where it was left.
    pub switch_lsn: Lsn,
}

/// A slot just made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreatedSlot {
    /// The stream holds exactly what commits after this position.
    pub consistent_lsn: Lsn,
    /// Name of the snapshot that shows the data as of that position; it goes with the next command on this connection.
    pub snapshot: String,
}

/// Where a slot stands.
#[derive(Debug, Clone, Copy)]
pub(super) struct Standing {
    /// Decoding begins here.
    pub(super) restart: Lsn,
    /// Up to here everything was confirmed.
    pub(super) confirmed: Lsn,
    /// What the server has on disk, or has replayed.
    pub(super) flushed: Lsn,
}

/// What is decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decoding {
    /// From this slot.
    pub slot: String,
    /// What this publication names.
    pub publication: String,
}

type Field = Option<Bytes>;

/// What the rows of a stretch take at the server before they go to a temporary file; most stretches fit.
const STRETCH_MEMORY: &str = "32MB";

/// A walsender finds out by wal_sender_timeout that its client is gone. Until there is a stream, the server's kernel has to, within
/// a minute too: or the lock would keep the next reader out for hours.
const WATCH_CLIENT: &str = "SET tcp_user_timeout = 60000; SET tcp_keepalives_idle = 20; \
     SET tcp_keepalives_interval = 10; SET tcp_keepalives_count = 4";

/// Options of pgoutput (PostgreSQL manual, section 55.5), names before values.
fn options(publication: &str) -> [(&'static str, String); 3] {
    // The list of publications is parsed as identifiers, inside a string constant.
    let publications = quote_literal(&quote_ident(publication));
    [("proto_version", quote_literal("1")), ("publication_names", publications), ("messages", quote_literal("true"))]
}

impl Replication {
    /// Connects to the database as a walsender, with the same pinned settings as an SQL session.
    ///
    /// # Errors
    /// As [`super::session::connect`]; `MissingRight` when the login lacks REPLICATION.
    pub async fn connect(info: &ConnInfo, application: &str) -> Result<Replication> {
        Self::open(info, Purpose::Replication, application).await
    }

    /// The same over an ordinary session, for queries: it takes none of the places of `max_wal_senders`.
    pub(super) async fn beside(info: &ConnInfo, application: &str) -> Result<Replication> {
        Self::open(info, Purpose::Sql, application).await
    }

    async fn open(info: &ConnInfo, purpose: Purpose, application: &str) -> Result<Replication> {
        let login = login::login(info, purpose, application).await?;
        let (version, backend_pid) = (login.version, login.backend_pid);
        let road = login.road;
        Ok(Replication { channel: Channel::new(login.io), version, backend_pid, road, place: info.to_string() })
    }

    /// `server_version_num`.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The walsender's process, as `pg_stat_activity` and `pg_locks` show it: what a slow slot creation waits behind, and
    /// what to cancel when nobody waits for it any more.
    pub fn backend_pid(&self) -> u32 {
        self.backend_pid
    }

    /// Who the server is.
    ///
    /// # Errors
    /// What the server says, or `Unreachable`.
    pub async fn identify_system(&mut self) -> Result<SystemIdentity> {
        let row = self.single_row("IDENTIFY_SYSTEM").await?;
        Ok(SystemIdentity {
            system_id: self.parsed(&row, 0)?,
            timeline: self.parsed(&row, 1)?,
            xlogpos: self.parsed(&row, 2)?,
            dbname: self.text(&row, 3)?.to_owned(),
        })
    }

    /// Where earlier timelines were left on the way to this one, oldest first; empty for timeline 1.
    ///
    /// # Errors
    /// What the server says, or `Unreachable`.
    pub async fn timeline_history(&mut self, timeline: u32) -> Result<Vec<TimelineSwitch>> {
        if timeline <= 1 {
            return Ok(Vec::new());
        }
        let row = self.single_row(&format!("TIMELINE_HISTORY {timeline}")).await?;
        parse_history(self.text(&row, 1)?).ok_or_else(|| self.bad("a timeline history that can't be read"))
    }

    /// Makes a permanent slot for pgoutput, without two_phase (P6), and waits until it is consistent: until every
    /// transaction that runs now has ended. `failover` counts from version 17 on.
    ///
    /// The future must not be dropped while the server still waits: the slot would stay behind. Cancel
    /// [`Replication::backend_pid`] from another session instead.
    ///
    /// # Errors
    /// What the server says: `Sql` with SQLSTATE 42710 when the slot exists, `BadSetting` when there is no room for
    /// one or `wal_level` is too low.
    pub async fn create_slot(&mut self, name: &str, failover: bool) -> Result<CreatedSlot> {
        let failover = if failover && self.version >= 170_000 { ", FAILOVER true" } else { "" };
        let name = quote_ident(name);
        let command = format!("CREATE_REPLICATION_SLOT {name} LOGICAL pgoutput (SNAPSHOT 'export'{failover})");
        let row = self.single_row(&command).await?;
        Ok(CreatedSlot { consistent_lsn: self.parsed(&row, 1)?, snapshot: self.text(&row, 2)?.to_owned() })
    }

    /// Starts the stream where the slot was confirmed (P1: the position asked for is 0/0, so nothing can be skipped).
    ///
    /// # Errors
    /// As [`Self::start_at`].
    pub async fn start(self, slot: &str, publication: &str) -> Result<Stream> {
        self.start_at(slot, publication, Lsn::ZERO).await
    }

    /// Starts the stream behind the transactions that were committed before `from`, which the caller has received otherwise; the
    /// slot stays where it was confirmed. With [`Lsn::ZERO`] it starts there. It never makes a slot.
    ///
    /// # Errors
    /// `SlotLost` when there is no such slot or it was invalidated, `SecondReader` when it is in use, `ForeignSlot` when
    /// it belongs to another database, and what else the server says.
    pub(super) async fn start_at(mut self, slot: &str, publication: &str, from: Lsn) -> Result<Stream> {
        let options = options(publication).map(|(name, value)| format!("{name} {value}")).join(", ");
        let command = format!("START_REPLICATION SLOT {} LOGICAL {from} ({options})", quote_ident(slot));
        self.send_query(&command).await?;
        loop {
            let raw = self.channel.next().await.map_err(|error| self.broken(&error))?;
            if raw.first() == Some(&COPY_BOTH_RESPONSE) {
                let channel = self.take_channel();
                return Ok(Stream::new(channel, self.road, self.place.clone()));
            }
            match self.parse(&raw)? {
                Message::ErrorResponse(body) => return Err(self.start_fault(slot, &mut body.fields())),
                Message::NoticeResponse(_) | Message::ParameterStatus(_) => {}
                _ => return Err(self.bad("something else than a stream to START_REPLICATION")),
            }
        }
    }

    fn take_channel(&mut self) -> Channel {
        let io = channel::take(&mut self.channel.io);
        Channel { io, buffer: std::mem::take(&mut self.channel.buffer) }
    }

    /// Notes that this session reads the slot, for as long as it lasts; false when another one does.
    pub(super) async fn claim(&mut self, decoding: &Decoding) -> Result<bool> {
        let lock = slot::reader_lock(&quote_literal(&decoding.slot));
        let row = self.single_row(&format!("{WATCH_CLIENT}; SELECT pg_try_advisory_lock({lock})")).await?;
        Ok(self.text(&row, 0)? == "t")
    }

    /// A copy of the slot, which may be moved at will, and is gone with the session. The inner error is the server's refusal.
    pub(super) async fn copy_slot(&mut self, of: &Decoding) -> Result<std::result::Result<Decoding, Fault>> {
        let slot = format!("sitepair_ahead_{}", self.backend_pid);
        let (from, to) = (quote_literal(&of.slot), quote_literal(&slot));
        let sql = format!("{WATCH_CLIENT}; SELECT pg_copy_logical_replication_slot({from}, {to}, true)");
        let copied = self.rows(&sql).await?;
        Ok(copied.map(|_| Decoding { slot, publication: of.publication.clone() }))
    }

    /// Where the slot stands; `None` when there is none or it has no position, and where only a stream does what the server is
    /// set to do: drop slots that nobody reads for a while, as one that is read by its copy would seem to be, or keep back what
    /// standbys do not have yet (`synchronized_standby_slots`), which holds for failover slots and no copy of one is.
    pub(super) async fn standing(&mut self, decoding: &Decoding) -> Result<Option<Standing>> {
        let sql = format!(
            "SELECT restart_lsn, confirmed_flush_lsn, \
             CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_flush_lsn() END \
             FROM pg_replication_slots s WHERE slot_name = {} AND restart_lsn IS NOT NULL AND confirmed_flush_lsn IS NOT NULL \
             AND NOT EXISTS (SELECT FROM pg_settings WHERE name = 'idle_replication_slot_timeout' AND setting <> '0' \
             OR name = 'synchronized_standby_slots' AND setting <> '' AND (to_jsonb(s)->>'failover')::bool)",
            quote_literal(&decoding.slot)
        );
        let rows = self.rows(&sql).await??;
        let Some(row) = rows.first() else { return Ok(None) };
        let (restart, confirmed, flushed) = (self.parsed(row, 0)?, self.parsed(row, 1)?, self.parsed(row, 2)?);
        Ok(Some(Standing { restart, confirmed, flushed }))
    }

    /// Asks for the slot's messages up to `upto`, and moves it there: the rows of a cursor, which come after the answer to
    /// COMMIT.
    pub(super) async fn ask_stretch(&mut self, decoding: &Decoding, upto: Lsn, within: Duration) -> Result<()> {
        let options = options(&decoding.publication).map(|(name, value)| format!("{}, {value}", quote_literal(name)));
        // The first FETCH decodes all of it; where that takes longer, nothing was shown yet.
        let sql = format!(
            "{}; SET LOCAL work_mem = '{STRETCH_MEMORY}'; DECLARE changes BINARY NO SCROLL CURSOR WITH HOLD FOR \
             SELECT data FROM pg_logical_slot_get_binary_changes({}, '{upto}', NULL, {}); \
             FETCH 1 FROM changes; COMMIT; FETCH ALL FROM changes; CLOSE changes",
            begin(within),
            quote_literal(&decoding.slot),
            options.join(", ")
        );
        self.send_query(&sql).await
    }

    /// Moves the slot to `to`, which is durable elsewhere (P2). The inner error is the server's refusal.
    pub(super) async fn advance(
        &mut self,
        decoding: &Decoding,
        to: Lsn,
        within: Duration,
    ) -> Result<std::result::Result<(), Fault>> {
        let slot = quote_literal(&decoding.slot);
        let sql = format!("{}; SELECT pg_replication_slot_advance({slot}, '{to}'); COMMIT", begin(within));
        Ok(self.rows(&sql).await?.map(|_| ()))
    }

    /// Ends the transaction that an error has left open.
    pub(super) async fn reset(&mut self) -> Result<()> {
        self.rows("ROLLBACK").await??;
        Ok(())
    }

    /// The next message if it is there as a whole, and its tag.
    pub(super) fn whole_message(&mut self) -> Result<Option<(u8, Bytes)>> {
        let Some(total) = self.channel.whole().map_err(|error| self.broken(&error))? else { return Ok(None) };
        let message = self.channel.buffer.split_to(total).freeze();
        Ok(message.first().copied().map(|tag| (tag, message)))
    }

    /// Waits for bytes.
    pub(super) async fn fill(&mut self) -> Result<()> {
        self.channel.make_room().map_err(|error| self.broken(&error))?;
        self.channel.fill().await.map(|_| ()).map_err(|error| self.broken(&error))
    }

    pub(super) fn place(&self) -> &str {
        &self.place
    }

    pub(super) fn server_fault(&self, state: &str, message: &str) -> Fault {
        sqlstate::server_fault(state, message).at(&self.place)
    }

    fn start_fault(&self, slot: &str, fields: &mut ErrorFields<'_>) -> Fault {
        let (state, message) = error_fields(fields);
        let code = match state.as_str() {
            "42704" => Code::SlotLost,
            "55006" => Code::SecondReader,
            // One SQLSTATE for several states; where the server speaks another language they all count as lost.
            "55000" if message.contains("wal_level") => Code::BadSetting,
            "55000" if message.contains("this database") || message.contains("physical") => Code::ForeignSlot,
            "55000" => Code::SlotLost,
            _ => return self.server_fault(&state, &message),
        };
        Fault::new(code, format!("slot \"{slot}\": {message} (SQLSTATE {state})")).at(&self.place)
    }

    async fn send_query(&mut self, command: &str) -> Result<()> {
        let mut message = BytesMut::new();
        frontend::query(command, &mut message).map_err(|error| self.broken(&error))?;
        self.channel.send(&message).await.map_err(|error| self.broken(&error))
    }

    /// Runs a command that answers with exactly one row.
    async fn single_row(&mut self, command: &str) -> Result<Vec<Field>> {
        let mut rows = self.rows(command).await??;
        match rows.pop() {
            Some(row) if rows.is_empty() => Ok(row),
            _ => Err(self.bad(&format!("not one row to {command}"))),
        }
    }

    /// Runs a command, or several queries; returns the rows of all. The inner error is what the server said.
    async fn rows(&mut self, command: &str) -> Result<std::result::Result<Vec<Vec<Field>>, Fault>> {
        self.send_query(command).await?;
        let (mut rows, mut failed) = (Vec::new(), None);
        loop {
            let raw = self.channel.next().await.map_err(|error| self.broken(&error))?;
            match self.parse(&raw)? {
                Message::DataRow(body) => rows.push(fields(&body).map_err(|error| self.broken(&error))?),
                Message::ErrorResponse(body) => {
                    let (state, message) = error_fields(&mut body.fields());
                    failed = Some(self.server_fault(&state, &message));
                }
                Message::ReadyForQuery(_) => break,
                _ => {}
            }
        }
        Ok(failed.map_or(Ok(rows), Err))
    }

    pub(super) fn parse(&self, raw: &Bytes) -> Result<Message> {
        let parsed = Message::parse(&mut BytesMut::from(&raw[..]));
        parsed.map_err(|error| self.broken(&error))?.ok_or_else(|| self.bad("half a message"))
    }

    fn text<'a>(&self, row: &'a [Field], position: usize) -> Result<&'a str> {
        let bytes = row.get(position).and_then(Option::as_deref);
        let text = bytes.and_then(|bytes| std::str::from_utf8(bytes).ok());
        text.ok_or_else(|| self.bad("a row without a value that it must have"))
    }

    fn parsed<T: std::str::FromStr>(&self, row: &[Field], position: usize) -> Result<T> {
        self.text(row, position)?.parse().map_err(|_| self.bad("a value that can't be read"))
    }

    pub(super) fn bad(&self, answer: &str) -> Fault {
        Fault::new(Code::BadStream, format!("{}: the server answered with {answer}", self.place))
    }

    fn broken(&self, error: &io::Error) -> Fault {
        Fault::new(Code::Unreachable, format!("{}: {error}", self.place))
    }
}

impl Drop for Replication {
    fn drop(&mut self) {
        channel::part(&mut self.channel.io, BytesMut::new());
    }
}

/// Begins a transaction whose statements may take so long, and that ends when nobody waits for it any more.
fn begin(within: Duration) -> String {
    format!(
        "BEGIN; SET LOCAL statement_timeout = {}; SET LOCAL client_connection_check_interval = 1000",
        within.as_millis().max(1)
    )
}

fn fields(body: &DataRowBody) -> io::Result<Vec<Field>> {
    let bytes = body.buffer_bytes();
    body.ranges().map(|range| Ok(range.map(|range| bytes.slice(range)))).collect()
}

/// Lines of `timeline <tab> position <tab> reason`; `#` begins a comment.
fn parse_history(text: &str) -> Option<Vec<TimelineSwitch>> {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let switches = lines.map(|line| {
        let mut words = line.split_whitespace();
        let timeline = words.next()?.parse().ok()?;
        Some(TimelineSwitch { timeline, switch_lsn: words.next()?.parse().ok()? })
    });
    switches.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeline_histories_are_read() {
        let text = "1\t0/3000148\tno recovery target specified\n\n# a comment\n 2\t1/A\tbefore 2026-01-01\n";
        let switch = |timeline, lsn| TimelineSwitch { timeline, switch_lsn: Lsn(lsn) };
        assert_eq!(parse_history(text), Some(vec![switch(1, 0x300_0148), switch(2, 0x1_0000_000A)]));
        assert_eq!(parse_history("1"), None);
        assert_eq!(parse_history("x\t0/1"), None);
    }
}
