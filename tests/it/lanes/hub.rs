//! The call recording service, one way: several targets, some tenants, accounts at once and logs at night, over a network that
//! breaks.

use std::fs;
use std::net::SocketAddr;

use tokio::runtime::Runtime;

use crate::pair::{PATIENCE, Pair};
use crate::peer::proxy::{Mischief, Proxy};
use crate::peer::sites::{both_ends, free_port, local, until};
use crate::peer::world::secret;
use crate::support::{Database, database};

const SCHEMA: &str = "
    create table account (id uuid primary key default gen_random_uuid(), tenant_id int not null, name text unique);
    create table recording (id uuid primary key default gen_random_uuid(), tenant_id int not null, account_id uuid references account, length int);
    create table call_log (id uuid primary key default gen_random_uuid(), tenant_id int not null, recording_id uuid, line text);
    create table secret_note (id uuid primary key default gen_random_uuid(), tenant_id int not null, note text);";
const TABLES: [&str; 3] = ["account", "recording", "call_log"];

/// The hub and two sites. Rules, lane and shared topic are those of `pipelines/hub.toml`.
struct Hub {
    pair: Pair,
    sites: [(&'static str, Database); 2],
}

impl Hub {
    fn new(version: u32, listen: SocketAddr, via: SocketAddr) -> Hub {
        let sites = ["north", "south"].map(|site| (site, database(version, 1)));
        let source = database(version, 0);
        for database in sites.iter().map(|(_, database)| database).chain([&source]) {
            database.sql(SCHEMA);
        }
        let pair = Pair::between(source, sites[0].1.clone(), "", "");
        secret(&pair.dir.path().join("token"), "a token of some length");
        let example = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/pipelines/hub.toml")).expect("readable");
        let rules =
            example.split_once("[[tables]]").expect("rules").1.split_once("[schedule.night]").expect("a lane").0;
        let nodes: String = sites
            .iter()
            .map(|(site, database)| format!("[site.{site}]\npostgres = \"{} sslmode=disable\"\n", database.conninfo()))
            .collect();
        // The night is when the test says so.
        let text = format!(
            "pipeline = \"{}\"\nflows = [\"hub -> north\", \"hub -> south\"]\n[site.hub]\npostgres = \"{} sslmode=disable\"\n\
             listen = \"{listen}\"\nurl = \"http://{via}\"\ntoken_file = \"token\"\n{nodes}[[tables]]{rules}[schedule.night]\n\
             mode = \"manual\"\n[topic]\nkind = \"peer\"\npath = \"topic\"\nshared = true\n[wal]\nlimit = \"10GiB\"\n",
            pair.name,
            pair.source.conninfo(),
        );
        fs::write(&pair.file, text).expect("writable");
        Hub { pair, sites }
    }

    /// Calls of three tenants, the third of which stays at the hub.
    fn calls(&self, rows: u32) {
        self.pair.source.sql(&format!(
            "insert into account (tenant_id, name) select i % 3 + 1, gen_random_uuid()::text from generate_series(1, {rows}) i;
             insert into recording (tenant_id, account_id, length) select tenant_id, id, length(name) from account;
             insert into call_log (tenant_id, recording_id, line) select tenant_id, id, repeat('line ', 20) from recording;
             insert into secret_note (tenant_id, note) select tenant_id, name from account;
             update recording set length = length + 1 where tenant_id = 1;
             delete from call_log where id in (select id from call_log where tenant_id = 2 limit 3)"
        ));
    }

    /// Number and digest of a table's rows of the tenants that cross; of all rows, at a target.
    fn rows(&self, database: &Database, table: &str) -> String {
        let of = if database.name == self.pair.source.name { "where tenant_id in (1, 2)" } else { "" };
        database.sql(&format!(
            "select count(*) || ' ' || coalesce(md5(string_agg(md5(t::text), '' order by id)), '-') from {table} t {of}"
        ))
    }

    /// Waits until both sites have a table as the hub has it.
    fn arrives(&self, table: &str) {
        let rows = self.rows(&self.pair.source, table);
        for (site, database) in &self.sites {
            until(&format!("{table} arrives at {site}\n{}", self.pair.log()), PATIENCE, || {
                self.rows(database, table) == rows
            });
        }
    }

    fn logs(&self) -> [String; 2] {
        [0, 1].map(|at| self.sites[at].1.sql("select count(*) from call_log"))
    }

    /// At a site's node: what the night has brought.
    fn night(&self, site: &str) {
        let flow = format!("{}_night_hub_{site}", self.pair.name);
        let ended = self.pair.sitepair(&["--site", site, "--flow", &flow, "run", "--once", "--applier"]);
        assert_eq!(ended.code, 0, "{}", ended.stderr);
    }
}

#[test]
fn accounts_at_once_and_logs_at_night_at_every_site() {
    for version in both_ends() {
        let runtime = Runtime::new().expect("a runtime");
        let listen = local(free_port());
        let proxy = runtime.block_on(Proxy::start(listen, 11));
        let hub = Hub::new(version, listen, proxy.address);
        hub.calls(60);
        hub.pair.deploy();
        let slots = "select string_agg(slot_name, ' ' order by slot_name) from pg_replication_slots where database = current_database()";
        let name = &hub.pair.name;
        assert_eq!(
            hub.pair.source.sql(slots),
            format!("sitepair_{name}_hub sitepair_{name}_night_hub"),
            "one for each lane"
        );
        let mut nodes = ["hub", "north", "south"].map(|site| hub.pair.daemon(&["--site", site], &[]));
        hub.arrives("account");
        hub.arrives("recording");
        hub.calls(40);
        hub.arrives("recording");
        assert_eq!(hub.logs(), ["0", "0"], "it is day");
        // The network breaks; what the hub writes meanwhile comes when it is back.
        proxy.set(Mischief::Sever);
        hub.calls(30);
        nodes[1].kill();
        nodes[1] = hub.pair.daemon(&["--site", "north"], &[]);
        proxy.set(Mischief::None);
        hub.arrives("account");
        hub.arrives("recording");
        assert_eq!(hub.logs(), ["0", "0"], "it is day");
        // The night comes to one site, then to the other.
        for (site, database) in &hub.sites {
            until(&format!("the night at {site}\n{}", hub.pair.log()), PATIENCE, || {
                hub.night(site);
                hub.rows(database, "call_log") == hub.rows(&hub.pair.source, "call_log")
            });
        }
        for table in TABLES {
            hub.arrives(table);
        }
        assert!(hub.sites.iter().all(|(_, database)| database.sql("select count(*) from secret_note") == "0"));
        for node in &mut nodes {
            assert_eq!(node.stop(), 0, "{}", hub.pair.log());
        }
        let undeployed = hub.pair.sitepair(&["undeploy", "--yes"]);
        assert_eq!((undeployed.code, hub.pair.source.sql(slots)), (0, String::new()), "{}", undeployed.stderr);
    }
}
