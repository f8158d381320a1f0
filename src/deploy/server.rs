//! One site's server, database and login: what they are, and what about them stands in the way.

use std::time::Duration;

use bytesize::ByteSize;
use tokio_postgres::Client;

use crate::config::{ConnInfo, OnLimit, Site, SslMode, Wal};
use crate::model::names::{quote_ident, quote_literal};
use crate::model::{FlowName, Result};
use crate::postgres::replication::Replication;
use crate::postgres::session::{self, Session};
use crate::postgres::size;
use crate::postgres::slot::SlotState;
use crate::postgres::sqlstate;

use super::finding::Findings;
use super::script::Values;

/// Oldest and newest major version that is tested.
const VERSIONS: std::ops::RangeInclusive<u32> = 15..=18;

/// What the daemon's connections are called where the pipeline file gives no `application_name`.
const APPLICATION: &str = "sitepair";

/// A site with its administrative session.
pub(super) struct Node<'a> {
    pub(super) site: &'a Site,
    pub(super) session: Session,
    pub(super) server: Server,
    pub(super) login: Login,
}

/// Settings and facts of the server and the database.
#[derive(Debug, Clone)]
pub(super) struct Server {
    pub(super) version: u32,
    in_recovery: bool,
    wal_level: String,
    slots_max: i64,
    slots_used: i64,
    senders_max: i64,
    senders_used: i64,
    origins_max: i64,
    origins_used: i64,
    keep_size_mb: i64,
    idle_slot_timeout: i64,
    synchronous_standby_names: String,
    encoding: String,
    locale: String,
    pub(super) database: String,
}

/// The role that runs the daemon.
#[derive(Debug, Clone)]
pub(super) struct Login {
    pub(super) name: String,
    pub(super) exists: bool,
    pub(super) superuser: bool,
    replication: bool,
    bypass_rls: bool,
}

impl<'a> Node<'a> {
    /// Connects as the administrator (the login, where the file names none) and looks around.
    pub(super) async fn open(site: &'a Site) -> Result<Self> {
        let session = session::connect(&site.admin, "sitepair deploy").await.map_err(|fault| fault.at(&site.name))?;
        let server = Server::read(&session, session.version).await.map_err(|fault| fault.at(&site.name))?;
        let login = Login::read(&session, &site.postgres.user).await.map_err(|fault| fault.at(&site.name))?;
        Ok(Self { site, session, server, login })
    }

    /// What the placeholders in the files of `sql/` stand for here.
    pub(super) fn values(&self) -> Values<'_> {
        Values::from([("login", self.login.name.as_str()), ("database", self.server.database.as_str())])
    }

    /// From now on no statement of the session waits longer for a lock.
    pub(super) async fn bound_locks(&self, timeout: Duration) -> Result<()> {
        let sql = format!("SET lock_timeout = {}", timeout.as_millis().clamp(1, i32::MAX as u128));
        self.session.batch_execute(&sql).await.map_err(|error| sqlstate::fault(&error).at(self.name()))
    }

    /// The site's name.
    pub(super) fn name(&self) -> &'a str {
        &self.site.name
    }
}

impl Server {
    async fn read(client: &Client, version: u32) -> Result<Self> {
        let sql = "SELECT pg_is_in_recovery(), current_setting('wal_level'), \
             current_setting('max_replication_slots')::int8, (SELECT count(*) FROM pg_replication_slots), \
             current_setting('max_wal_senders')::int8, (SELECT count(*) FROM pg_stat_get_wal_senders()), \
             coalesce(current_setting('max_active_replication_origins', true), current_setting('max_replication_slots'))::int8, \
             (SELECT count(*) FROM pg_replication_origin), \
             (SELECT setting::int8 FROM pg_settings WHERE name = 'max_slot_wal_keep_size'), \
             coalesce((SELECT setting::int8 FROM pg_settings WHERE name = 'idle_replication_slot_timeout'), 0), \
             current_setting('synchronous_standby_names'), pg_encoding_to_char(encoding)::text, \
             concat_ws(', ', 'provider ' || datlocprovider::text, \
                       coalesce(to_jsonb(d) ->> 'datlocale', to_jsonb(d) ->> 'daticulocale'), datcollate, datctype), \
             datname::text \
             FROM pg_database d WHERE datname = current_database()";
        let row = client.query_one(sql, &[]).await.map_err(|error| sqlstate::fault(&error))?;
        Ok(Self {
            version,
            in_recovery: row.get(0),
            wal_level: row.get(1),
            slots_max: row.get(2),
            slots_used: row.get(3),
            senders_max: row.get(4),
            senders_used: row.get(5),
            origins_max: row.get(6),
            origins_used: row.get(7),
            keep_size_mb: row.get(8),
            idle_slot_timeout: row.get(9),
            synchronous_standby_names: row.get(10),
            encoding: row.get(11),
            locale: row.get(12),
            database: row.get(13),
        })
    }

    /// Findings that any site can have.
    fn check_common(&self, found: &mut Findings<'_>) {
        let major = self.version / 10_000;
        if !VERSIONS.contains(&major) {
            let what = format!("PostgreSQL {major} is not supported");
            found.blocking("server", what, "use a server of version 15 to 18");
        }
        if self.in_recovery {
            let remedy = "name the primary in the pipeline file";
            found.blocking("server", "is in recovery (a standby)", remedy);
        }
        if self.encoding != "UTF8" {
            let what = format!("encoding is {}", self.encoding);
            let remedy = if self.encoding == "SQL_ASCII" {
                "make sure that it holds valid UTF-8 only: anything else stops the flow"
            } else {
                "make sure that all characters exist in this encoding: others stop the flow"
            };
            found.warning(format!("database {}", self.database), what, remedy);
        }
    }
}

/// Findings about a source that lacks so many of the pipeline's slots.
pub(super) fn check_source(
    node: &Node<'_>,
    flow: &FlowName,
    wal: &Wal,
    missing_slots: usize,
    found: &mut Findings<'_>,
) {
    let server = &node.server;
    server.check_common(found);
    if server.wal_level != "logical" {
        let what = format!("wal_level is {}", server.wal_level);
        found.blocking("wal_level", what, "ALTER SYSTEM SET wal_level = 'logical'; -- then restart the server");
    }
    for (setting, max, used, of) in [
        ("max_replication_slots", server.slots_max, server.slots_used, "replication slots"),
        ("max_wal_senders", server.senders_max, server.senders_used, "WAL senders"),
    ] {
        let missing = missing_slots.cast_signed() as i64;
        if missing > 0 && used + missing > max {
            let what = match missing {
                1 => format!("all {max} {of} are in use"),
                more => format!("{used} of {max} {of} are in use, and {more} more are needed"),
            };
            let remedy = format!("ALTER SYSTEM SET {setting} = {}; -- then restart the server", used + missing + 3);
            found.blocking(setting, what, remedy);
        }
    }
    check_wal(server, wal, found);
    check_listen(node.site, found);
    let names = &server.synchronous_standby_names;
    let ours = [node.site.postgres.application_name.clone().unwrap_or_else(|| APPLICATION.to_owned()), flow.object()];
    if let Some(name) = matching_standby(names, &ours) {
        let what = format!("\"{name}\" matches the reader: commits would wait for the other site");
        let remedy =
            "name the real standbys in synchronous_standby_names, without * and without names that start with sitepair";
        found.blocking("synchronous_standby_names", what, remedy);
    }
    check_login(node, true, found);
}

/// A site's own word that nothing needs to be encrypted is worth a look each time.
fn check_listen(site: &Site, found: &mut Findings<'_>) {
    if site.insecure_listen && site.tls.cert.is_none() {
        found.warning(
            "insecure_listen",
            "rows and the token cross the network unencrypted: who can read along can read and forge both",
            "give tls.cert and tls.key, and remove insecure_listen",
        );
    }
}

/// Whether anything bounds the WAL that the slot holds back. What `on_limit` costs is said by [`check_limit`].
fn check_wal(server: &Server, wal: &Wal, found: &mut Findings<'_>) {
    let keep_bytes = u64::try_from(server.keep_size_mb).ok().map(|mb| mb << 20);
    match (wal.limit_bytes, keep_bytes) {
        (None, None) => found.warning(
            "[wal]",
            "no limit: while the reader is away the slot keeps WAL until the disk is full",
            "add to the pipeline file: [wal] limit = \"50GiB\" (what the disk can spare)",
        ),
        (None, Some(_)) => found.warning(
            "[wal]",
            "no limit in the pipeline file, so nothing warns before the server invalidates the slot",
            format!("add to the pipeline file: [wal] limit below max_slot_wal_keep_size ({} MB)", server.keep_size_mb),
        ),
        (Some(limit), Some(keep)) if keep < limit => found.warning(
            "max_slot_wal_keep_size",
            format!(
                "{} MB is below [wal] limit: the server invalidates the slot before sitepair warns",
                server.keep_size_mb
            ),
            format!(
                "ALTER SYSTEM SET max_slot_wal_keep_size = '{}MB'; SELECT pg_reload_conf();",
                limit.div_ceil(1 << 20)
            ),
        ),
        (Some(_), _) => {}
    }
    if server.idle_slot_timeout > 0 {
        found.warning(
            "idle_replication_slot_timeout",
            "the server invalidates the slot when the reader is away for so long",
            "ALTER SYSTEM SET idle_replication_slot_timeout = 0; SELECT pg_reload_conf();",
        );
    }
}

/// What `wal.on_limit` does and what that costs, and whether the slot is past the limit already.
pub(super) async fn check_limit(
    node: &Node<'_>,
    wal: &Wal,
    tables: &[String],
    slot: Option<&SlotState>,
    found: &mut Findings<'_>,
) -> Result<()> {
    let Some(limit) = wal.limit_bytes else { return Ok(()) };
    let sizes = size::estimates(&node.session, tables).await.map_err(|fault| fault.at(node.name()))?;
    let rows = match sizes.iter().map(|size| size.rows).sum::<Option<u64>>() {
        Some(rows) => format!("about {rows} rows"),
        None => "an unknown number of rows".to_owned(),
    };
    let bytes = ByteSize(sizes.iter().map(|size| size.bytes).sum());
    let copy = format!("{} tables with {rows}, {bytes} on disk", sizes.len());
    let limit_text = ByteSize(limit);
    let what = match wal.on_limit {
        OnLimit::Alert => format!(
            "on_limit = \"alert\": past {limit_text} sitepair raises an alarm and does nothing; at worst the disk fills and the \
             server stops. Nothing has to be copied again"
        ),
        OnLimit::DropSlot => format!(
            "on_limit = \"drop-slot\": past {limit_text} the daemon that reads the slot, or the one of site {}, drops it unless \
             the reader is catching up; the flow then stops (exit 4), and `resync` copies {copy}",
            node.name()
        ),
    };
    found.info("[wal]", what, "");
    let Some(slot) = slot.filter(|slot| slot.retained_bytes >= limit && slot.invalidation.is_none()) else {
        return Ok(());
    };
    let (subject, held) = (format!("slot {}", slot.name), ByteSize(slot.retained_bytes));
    match wal.on_limit {
        OnLimit::Alert => {
            found.warning(
                subject,
                format!("holds back {held} of WAL, the limit is {limit_text}"),
                "start `sitepair run`",
            );
        }
        OnLimit::DropSlot => {
            let what = format!(
                "holds back {held} of WAL, the limit is {limit_text}: `sitepair run` drops it within seconds unless its reader \
                 catches up; then {copy} are copied again"
            );
            found.warning(subject, what, "to catch up at any rate: raise [wal] limit before `sitepair run`");
        }
    }
    Ok(())
}

/// Findings about a target that lacks so many of the flow's origins.
pub(super) fn check_target(node: &Node<'_>, missing_origins: usize, found: &mut Findings<'_>) {
    let server = &node.server;
    server.check_common(found);
    if missing_origins > 0 && server.origins_used + missing_origins.cast_signed() as i64 > server.origins_max {
        let setting =
            if server.version >= 180_000 { "max_active_replication_origins" } else { "max_replication_slots" };
        let what = format!("{} of {} replication origins are in use", server.origins_used, server.origins_max);
        let remedy = format!("ALTER SYSTEM SET {setting} = {}; -- then restart the server", server.origins_max + 4);
        found.blocking(setting, what, remedy);
    }
    check_login(node, false, found);
}

fn check_login(node: &Node<'_>, source: bool, found: &mut Findings<'_>) {
    let login = &node.login;
    let role = quote_ident(&login.name);
    let subject = format!("role {}", login.name);
    if !login.exists {
        let attributes = if source { "LOGIN REPLICATION" } else { "LOGIN" };
        found.blocking(&subject, "does not exist", format!("CREATE ROLE {role} {attributes};"));
    } else if source && !login.replication && !login.superuser {
        found.blocking(&subject, "may not read a replication slot", format!("ALTER ROLE {role} REPLICATION;"));
    }
    for conninfo in [&node.site.postgres, &node.site.admin] {
        check_tls(conninfo, found);
        if node.site.postgres == node.site.admin {
            break;
        }
    }
}

fn check_tls(conninfo: &ConnInfo, found: &mut Findings<'_>) {
    let Some(host) = conninfo.hosts.iter().find(|host| !is_local(host.hostaddr.as_deref().unwrap_or(&host.host)))
    else {
        return;
    };
    let subject = format!("connection {conninfo}");
    let remedy = "set sslmode=verify-full (and sslrootcert) in the pipeline file";
    match conninfo.sslmode {
        SslMode::Disable | SslMode::Allow | SslMode::Prefer => {
            found.warning(subject, format!("TLS is not required on the way to {}", host.host), remedy);
        }
        SslMode::Require => {
            found.info(subject, format!("the certificate of {} may not be checked", host.host), remedy);
        }
        SslMode::VerifyCa | SslMode::VerifyFull => {}
    }
}

/// A Unix socket or the loopback interface.
fn is_local(host: &str) -> bool {
    host.starts_with(['/', '@'])
        || host == "localhost"
        || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// The name in `synchronous_standby_names` that one of ours would match (PostgreSQL manual, section 20.6.2: names are
/// compared without case, `*` matches any).
fn matching_standby(setting: &str, ours: &[String]) -> Option<String> {
    let list = setting.split_once('(').map_or(setting, |(_, rest)| rest.trim_end().trim_end_matches(')'));
    list.split(',').map(|name| name.trim().trim_matches('"')).filter(|name| !name.is_empty()).find_map(|name| {
        let lower = name.to_lowercase();
        let hit = name == "*" || lower.starts_with(APPLICATION) || ours.iter().any(|our| our.to_lowercase() == lower);
        hit.then(|| name.to_owned())
    })
}

/// Connects as the daemon will: what its password, pg_hba.conf, TLS or rights refuse is a finding.
pub(super) async fn check_connection(node: &Node<'_>, source: bool, found: &mut Findings<'_>) {
    if !node.login.exists {
        return;
    }
    let conninfo = &node.site.postgres;
    let mut outcome = session::connect(conninfo, APPLICATION).await.map(|_| ());
    if source && outcome.is_ok() && (node.login.replication || node.login.superuser) {
        outcome = walsender(conninfo).await;
    }
    if let Err(fault) = outcome {
        let remedy = fault.remedy.as_deref().unwrap_or_else(|| fault.code.remedy());
        found.blocking(format!("connection {conninfo}"), &fault.what, remedy);
    }
}

async fn walsender(conninfo: &ConnInfo) -> Result<()> {
    Replication::connect(conninfo, APPLICATION).await?.identify_system().await.map(|_| ())
}

/// Findings about two databases together.
pub(super) fn check_pair(source: &Node<'_>, target: &Node<'_>, found: &mut Findings<'_>) {
    if source.server.locale != target.server.locale {
        let what = format!(
            "its collation ({}) is not that of {} ({})",
            target.server.locale,
            source.name(),
            source.server.locale
        );
        let remedy = "order and case mapping of text differ between the sites; create the database with the same locale if that matters";
        found.warning(format!("database {}", target.server.database), what, remedy);
    }
}

impl Login {
    async fn read(client: &Client, name: &str) -> Result<Self> {
        let sql = "SELECT rolsuper, rolreplication, rolbypassrls FROM pg_roles WHERE rolname = $1";
        let row = client.query_opt(sql, &[&name]).await.map_err(|error| sqlstate::fault(&error))?;
        let attribute = |index: usize| row.as_ref().is_some_and(|row| row.get(index));
        Ok(Self {
            name: name.to_owned(),
            exists: row.is_some(),
            superuser: attribute(0),
            replication: attribute(1),
            bypass_rls: attribute(2),
        })
    }

    /// True when row level security never applies to the role.
    pub(super) fn sees_all_rows(&self) -> bool {
        self.superuser || self.bypass_rls
    }
}

/// Other writers and other origins at a site: (subject, what, remedy).
pub(super) async fn check_others(
    node: &Node<'_>,
    flow: &FlowName,
    source: bool,
    found: &mut Findings<'_>,
) -> Result<()> {
    let fault = |error| sqlstate::fault(&error).at(node.name());
    let sql = "SELECT subname::text FROM pg_subscription s JOIN pg_database d ON d.oid = s.subdbid \
               WHERE d.datname = current_database() AND s.subenabled ORDER BY 1";
    for row in node.session.query(sql, &[]).await.map_err(fault)? {
        let name: String = row.get(0);
        if source {
            let what = "writes here too; what it brings is replicated like local data";
            found.info(format!("subscription {name}"), what, "");
        } else {
            let what = "writes here too: two writers of one table overwrite each other";
            let remedy = format!("ALTER SUBSCRIPTION {} DISABLE; -- unless it brings other tables", quote_ident(&name));
            found.warning(format!("subscription {name}"), what, remedy);
        }
    }
    if source {
        let sql = "SELECT roname FROM pg_replication_origin WHERE NOT starts_with(roname, $1) AND roname !~ '^pg_[0-9]' ORDER BY 1";
        for row in node.session.query(sql, &[&format!("sitepair_{}_", flow.pipeline)]).await.map_err(fault)? {
            let name: String = row.get(0);
            let what = "is not of this pipeline; what comes by it is replicated like local data";
            found.info(
                format!("origin {name}"),
                what,
                format!("SELECT pg_replication_origin_drop({}); -- if nothing uses it", quote_literal(&name)),
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn standby_names_that_match_us() {
        let ours = ["Reader".to_owned(), "sitepair_p_a_b".to_owned()];
        for (setting, expected) in [
            ("", None),
            ("s1, s2", None),
            ("*", Some("*")),
            ("FIRST 2 (s1, \"*\")", Some("*")),
            ("ANY 1 (s1, READER)", Some("READER")),
            ("2 (s1, \"Sitepair_x\")", Some("Sitepair_x")),
        ] {
            assert_eq!(matching_standby(setting, &ours).as_deref(), expected, "{setting}");
        }
    }

    #[test]
    fn loopback_needs_no_tls() {
        for (host, local) in [
            ("/run/postgresql", true),
            ("@x", true),
            ("127.0.0.1", true),
            ("127.9.9.9", true),
            ("::1", true),
            ("localhost", true),
            ("10.0.0.1", false),
            ("localhost.example", false),
        ] {
            assert_eq!(is_local(host), local, "{host}");
        }
    }
}
