//! `sslmode`, certificates, channel binding and password methods against servers with and without TLS.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose, SigningKey};
use x509_cert::Certificate;
use x509_cert::certificate::Version;
use x509_cert::der::asn1::BitString;
use x509_cert::der::{Decode, Encode};

use crate::support::{own_cluster, psql, versions};
use sitepair::cli::demo::cluster::Cluster;
use sitepair::config::{ConnInfo, Secret, conninfo};
use sitepair::model::{Class, Code, Fault};
use sitepair::postgres::replication::Replication;
use sitepair::postgres::session;

const HBA: &str = "
local   all postgres trust
host    all postgres 127.0.0.1/32 trust
hostnossl all plain_only 127.0.0.1/32 trust
hostssl all tls_only 127.0.0.1/32 trust
host    all either 127.0.0.1/32 trust
host    all read_only 127.0.0.1/32 trust
host    all scram 127.0.0.1/32 scram-sha-256
hostssl all clear_text 127.0.0.1/32 password
host    all md5_hash 127.0.0.1/32 md5
hostssl all certified 127.0.0.1/32 cert
";

/// A server whose certificate, `ssl` and pg_hba.conf can be changed while it runs.
struct Server {
    cluster: Cluster,
    dir: tempfile::TempDir,
    version: u32,
}

impl Server {
    fn start(version: u32) -> Server {
        let server = Server { cluster: own_cluster(version, &[]), dir: tempfile::tempdir().unwrap(), version };
        server.sql(
            "create role plain_only login; create role tls_only login; create role either login; create role nobody login;
             create role certified login; create role read_only login;
             alter role read_only set default_transaction_read_only = on;
             set password_encryption = 'scram-sha-256';
             create role scram login replication password 'the scram secret';
             create role clear_text login password 'the clear secret';
             set password_encryption = 'md5'; create role md5_hash login password 'the md5 secret'",
        );
        fs::write(server.cluster.data_dir().join("pg_hba.conf"), HBA).unwrap();
        server.reload();
        server
    }

    fn sql(&self, sql: &str) -> String {
        psql(&self.cluster, "postgres", sql)
    }

    /// Waits until new sessions see the new configuration.
    fn reload(&self) {
        let loaded = || self.sql("select pg_conf_load_time()");
        let before = loaded();
        self.sql("select pg_reload_conf()");
        while loaded() == before {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }

    /// Gives the server a certificate and turns TLS on.
    fn serve(&self, chain: &str, key: &KeyPair, client_ca: &str) {
        let owner = fs::metadata(self.cluster.data_dir()).unwrap();
        for (name, text) in [("server.crt", chain), ("server.key", &key.serialize_pem()), ("clients.crt", client_ca)] {
            let path = self.cluster.data_dir().join(name);
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
            chown(&path, Some(owner.uid()), Some(owner.gid())).unwrap();
        }
        self.sql("alter system set ssl_ca_file = 'clients.crt'");
        self.sql("alter system set ssl = on");
        self.reload();
    }

    fn without_tls(&self) {
        self.sql("alter system set ssl = off");
        self.reload();
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        path
    }

    fn info(&self, keywords: &str, password: &str) -> ConnInfo {
        let text = format!("hostaddr=127.0.0.1 port={} dbname=postgres {keywords}", self.cluster.port());
        let text = if keywords.contains("host=") { text } else { format!("host=localhost {text}") };
        let info = conninfo::parse(&text).unwrap();
        ConnInfo { password: (!password.is_empty()).then(|| Secret::new(password)), ..info }
    }

    /// Logs in; `Ok` says whether TLS was on, as the server sees it.
    async fn login(&self, keywords: &str, password: &str) -> Result<bool, Fault> {
        let session = session::connect(&self.info(keywords, password), "sitepair test").await?;
        let row = session.query_one("select ssl from pg_stat_ssl where pid = pg_backend_pid()", &[]).await.unwrap();
        assert_eq!(row.get::<_, bool>(0), session.tls);
        Ok(session.tls)
    }

    async fn check(&self, keywords: &str, password: &str, expected: Expected) {
        let outcome = self.login(keywords, password).await;
        let fits = match (&outcome, &expected) {
            (Ok(false), Expected::Plain) | (Ok(true), Expected::Tls) => true,
            (Err(fault), Expected::Refused(code, words)) => fault.code == *code && fault.to_string().contains(words),
            _ => false,
        };
        assert!(fits, "{}: {keywords}: expected {expected:?}, got {outcome:?}", self.version);
        let shown = format!("{outcome:?}");
        assert!(!shown.contains("secret") || password.is_empty(), "{shown}");
    }
}

#[derive(Debug, Clone, Copy)]
enum Expected {
    Plain,
    Tls,
    Refused(Code, &'static str),
}
use Expected::{Plain, Refused, Tls};

/// An authority that signs others.
struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

fn authority_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    params
}

fn root(name: &str) -> Authority {
    let (params, key) = (authority_params(name), KeyPair::generate().unwrap());
    let pem = params.self_signed(&key).unwrap().pem();
    Authority { pem, issuer: Issuer::new(params, key) }
}

fn intermediate(name: &str, by: &Authority) -> Authority {
    let (params, key) = (authority_params(name), KeyPair::generate().unwrap());
    let pem = params.signed_by(&key, &by.issuer).unwrap().pem();
    Authority { pem, issuer: Issuer::new(params, key) }
}

fn leaf_params(common: &str, names: &[&str]) -> CertificateParams {
    let mut params = CertificateParams::new(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>()).unwrap();
    params.distinguished_name.push(DnType::CommonName, common);
    params
}

fn expired(mut params: CertificateParams) -> CertificateParams {
    (params.not_before, params.not_after) = (rcgen::date_time_ymd(2020, 1, 1), rcgen::date_time_ymd(2021, 1, 1));
    params
}

/// Signs as `openssl x509 -req` does without an extension file: X.509 version 1.
fn version_1(server: &Server, common: &str, key: &KeyPair, by: &Authority) -> String {
    let template = leaf_params(common, &[]).signed_by(key, &by.issuer).unwrap();
    let mut certificate = Certificate::from_der(template.der()).unwrap();
    certificate.tbs_certificate.version = Version::V1;
    certificate.tbs_certificate.extensions = None;
    let signature = by.issuer.key().sign(&certificate.tbs_certificate.to_der().unwrap()).unwrap();
    certificate.signature = BitString::from_bytes(&signature).unwrap();
    let hex: String = certificate.to_der().unwrap().iter().map(|byte| format!("{byte:02x}")).collect();
    let base64 = server.sql(&format!("select encode(decode('{hex}', 'hex'), 'base64')"));
    format!("-----BEGIN CERTIFICATE-----\n{base64}\n-----END CERTIFICATE-----\n")
}

fn first_and_last() -> Vec<u32> {
    let all: Vec<u32> = versions().iter().map(|(version, _)| *version).collect();
    let mut ends = vec![*all.first().unwrap(), *all.last().unwrap()];
    ends.dedup();
    ends
}

fn path(path: &Path) -> String {
    path.display().to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_checked_as_libpq_does() {
    for version in first_and_last() {
        let server = Server::start(version);
        let (ca, stranger) = (root("the root"), root("a stranger"));
        let between = intermediate("between", &ca);
        let key = KeyPair::generate().unwrap();
        let signed = |params: CertificateParams, by: &Authority| params.signed_by(&key, &by.issuer).unwrap().pem();
        let roots = path(&server.file("roots.crt", &ca.pem));
        let other = path(&server.file("other.crt", &stranger.pem));
        let both = path(&server.file("both.crt", &format!("{}{}", stranger.pem, ca.pem)));
        let own = leaf_params("localhost", &["localhost"]);
        let own_pem = own.clone().self_signed(&key).unwrap().pem();
        let mut own_ca = authority_params("localhost");
        own_ca.subject_alt_names = own.subject_alt_names.clone();
        let own_ca_pem = own_ca.self_signed(&key).unwrap().pem();
        let own_root = path(&server.file("own.crt", &own_pem));
        let own_ca_root = path(&server.file("own_ca.crt", &own_ca_pem));
        let unknown = Refused(Code::BadTls, "unknown authority");
        let wrong_name = Refused(Code::BadTls, "not for host name \"localhost\"");
        let late = Refused(Code::BadTls, "has expired");
        let chained = format!("{}{}", signed(own.clone(), &between), between.pem);
        // Certificate; roots; then what verify-ca, verify-full and require with those roots give.
        let table = [
            ("direct", signed(own.clone(), &ca), &roots, [Tls, Tls, Tls]),
            ("among several roots", signed(own.clone(), &ca), &both, [Tls, Tls, Tls]),
            ("chained", chained.clone(), &roots, [Tls, Tls, Tls]),
            ("chain without its middle", signed(own.clone(), &between), &roots, [unknown; 3]),
            ("other authority", signed(own.clone(), &ca), &other, [unknown; 3]),
            ("chained, other authority", chained, &other, [unknown; 3]),
            ("expired", signed(expired(own.clone()), &ca), &roots, [late; 3]),
            ("other name", signed(leaf_params("db", &["db.example"]), &ca), &roots, [Tls, wrong_name, Tls]),
            ("common name only", signed(leaf_params("localhost", &[]), &ca), &roots, [Tls, Tls, Tls]),
            ("common name hidden", signed(leaf_params("localhost", &["db"]), &ca), &roots, [Tls, wrong_name, Tls]),
            ("self-signed, its own root", own_pem.clone(), &own_root, [Tls, Tls, Tls]),
            ("self-signed authority, its own root", own_ca_pem.clone(), &own_ca_root, [Tls, Tls, Tls]),
            ("self-signed, unknown", own_pem, &roots, [unknown; 3]),
            ("self-signed authority, unknown", own_ca_pem, &roots, [unknown; 3]),
            ("version 1", version_1(&server, "localhost", &key, &ca), &roots, [Tls, Tls, Tls]),
            ("version 1, other name", version_1(&server, "db", &key, &ca), &roots, [Tls, wrong_name, Tls]),
            ("version 1, unknown", version_1(&server, "localhost", &key, &ca), &other, [unknown; 3]),
        ];
        for (name, certificate, roots, [verify_ca, verify_full, require]) in table {
            println!("{version}: {name}");
            server.serve(&certificate, &key, &ca.pem);
            let with = |mode: &str, user: &str| format!("user={user} sslmode={mode} sslrootcert={roots}");
            server.check(&with("verify-ca", "either"), "", verify_ca).await;
            server.check(&with("verify-full", "either"), "", verify_full).await;
            server.check(&with("require", "either"), "", require).await;
            // Without roots nothing is checked; prefer falls back to plain when a check fails.
            server.check("user=either sslmode=require", "", Tls).await;
            server.check("user=either sslmode=prefer", "", Tls).await;
            let preferred = if matches!(require, Tls) { Tls } else { Plain };
            server.check(&with("prefer", "either"), "", preferred).await;
            server.check(&with("allow", "either"), "", Plain).await;
        }
        let missing = format!("user=either sslmode=verify-full sslrootcert={}/none.crt", server.dir.path().display());
        server.check(&missing, "", Refused(Code::BadSecret, "none.crt")).await;
        server.check("user=either sslmode=verify-ca", "", Refused(Code::BadTls, "root.crt does not exist")).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn modes_meet_servers_and_access_rules() {
    for version in first_and_last() {
        let server = Server::start(version);
        let key = KeyPair::generate().unwrap();
        let ca = root("the root");
        let certificate = leaf_params("localhost", &["localhost"]).signed_by(&key, &ca.issuer).unwrap().pem();
        let roots = path(&server.file("roots.crt", &ca.pem));
        let denied = Refused(Code::BadCredentials, "pg_hba.conf");
        let no_tls = Refused(Code::BadTls, "does not support TLS");
        let modes = ["disable", "allow", "prefer", "require", "verify-ca", "verify-full"];
        let check_all = async |user: &str, expected: [Expected; 6]| {
            for (mode, expected) in modes.into_iter().zip(expected) {
                let roots = if mode.starts_with("verify") { format!("sslrootcert={roots}") } else { String::new() };
                server.check(&format!("user={user} sslmode={mode} {roots}"), "", expected).await;
            }
        };
        server.serve(&certificate, &key, &ca.pem);
        check_all("either", [Plain, Plain, Tls, Tls, Tls, Tls]).await;
        check_all("plain_only", [Plain, Plain, Plain, denied, denied, denied]).await;
        check_all("tls_only", [denied, Tls, Tls, Tls, Tls, Tls]).await;
        check_all("nobody", [denied; 6]).await;
        server.without_tls();
        check_all("either", [Plain, Plain, Plain, no_tls, no_tls, no_tls]).await;
        check_all("tls_only", [denied, denied, denied, no_tls, no_tls, no_tls]).await;
        // A Unix socket never has TLS, whatever the mode.
        let socket = server.cluster.dir().display().to_string();
        let info =
            conninfo::parse(&format!("host={socket} port={} user=postgres sslmode=require", server.cluster.port()));
        assert!(!session::connect(&info.unwrap(), "sitepair test").await.unwrap().tls);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn passwords_and_channel_binding() {
    for version in first_and_last() {
        let server = Server::start(version);
        let key = KeyPair::generate().unwrap();
        let ca = root("the root");
        let certificate = leaf_params("localhost", &["localhost"]).signed_by(&key, &ca.issuer).unwrap().pem();
        server.serve(&certificate, &key, &ca.pem);
        let wrong = Refused(Code::BadCredentials, "password authentication failed");
        let missing = Refused(Code::BadCredentials, "password_file");
        let unbound = Refused(Code::BadCredentials, "channel_binding=require");
        let good = "the scram secret";
        for (keywords, password, expected) in [
            ("user=scram sslmode=disable", good, Plain),
            ("user=scram sslmode=require", good, Tls),
            ("user=scram sslmode=require channel_binding=require", good, Tls),
            ("user=scram sslmode=require channel_binding=disable", good, Tls),
            ("user=scram sslmode=disable channel_binding=require", good, Refused(Code::BadTls, "needs TLS")),
            ("user=scram sslmode=disable", "a wrong secret", wrong),
            ("user=scram sslmode=prefer", "a wrong secret", wrong),
            ("user=scram sslmode=require channel_binding=require", "a wrong secret", wrong),
            ("user=scram sslmode=disable", "", missing),
            ("user=either sslmode=require channel_binding=require", good, unbound),
            ("user=clear_text sslmode=require", "the clear secret", Tls),
            ("user=clear_text sslmode=require", "a wrong secret", wrong),
            ("user=clear_text sslmode=require channel_binding=require", "the clear secret", unbound),
            ("user=md5_hash sslmode=require", "the md5 secret", Tls),
            ("user=md5_hash sslmode=disable", "the md5 secret", Plain),
            ("user=md5_hash sslmode=disable", "a wrong secret", wrong),
            ("user=md5_hash sslmode=require channel_binding=require", "the md5 secret", unbound),
            ("user=either dbname=nowhere", "", Refused(Code::BadCredentials, "correct dbname")),
            ("user=read_only", "", Tls),
            ("user=read_only target_session_attrs=any", "", Tls),
            ("user=read_only target_session_attrs=read-write", "", Refused(Code::ServerBusy, "accepts no writes")),
            ("user=either target_session_attrs=read-write", "", Tls),
        ] {
            server.check(keywords, password, expected).await;
        }
        let walsender = |keywords: &str, password: &str| {
            let info = server.info(keywords, password);
            async move { Replication::connect(&info, "sitepair test").await.map(|_| ()).map_err(|fault| fault.code) }
        };
        assert_eq!(walsender("user=scram sslmode=require channel_binding=require", good).await, Ok(()));
        assert_eq!(walsender("user=scram", "a wrong secret").await, Err(Code::BadCredentials));
        assert_eq!(walsender("user=either", "").await, Err(Code::MissingRight));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn client_certificates() {
    for version in first_and_last() {
        let server = Server::start(version);
        let (ca, stranger) = (root("the root"), root("a stranger"));
        let key = KeyPair::generate().unwrap();
        let certificate = leaf_params("localhost", &["localhost"]).signed_by(&key, &ca.issuer).unwrap().pem();
        server.serve(&certificate, &key, &ca.pem);
        let client_key = KeyPair::generate().unwrap();
        let client = |name: &str, common: &str, by: &Authority| {
            let pem = leaf_params(common, &[]).signed_by(&client_key, &by.issuer).unwrap().pem();
            path(&server.file(name, &pem))
        };
        let good = client("good.crt", "certified", &ca);
        let other_user = client("other_user.crt", "somebody", &ca);
        let foreign = client("foreign.crt", "certified", &stranger);
        let key_file = path(&server.file("client.key", &client_key.serialize_pem()));
        let other_key = path(&server.file("other.key", &KeyPair::generate().unwrap().serialize_pem()));
        let open_key = server.file("open.key", &client_key.serialize_pem());
        fs::set_permissions(&open_key, fs::Permissions::from_mode(0o644)).unwrap();
        let open_key = path(&open_key);
        let no_pem = path(&server.file("no_pem.crt", "not a certificate"));
        for (certificate, key, expected) in [
            (&good, &key_file, Tls),
            (&other_user, &key_file, Refused(Code::BadCredentials, "certificate authentication failed")),
            (&foreign, &key_file, Refused(Code::BadTls, "the server refused the TLS connection")),
            (&good, &open_key, Refused(Code::BadSecret, "can be read by others")),
            (&good, &other_key, Refused(Code::BadSecret, "client certificate can't be used")),
            (&no_pem, &key_file, Refused(Code::BadSecret, "no_pem.crt")),
            (&good, &no_pem, Refused(Code::BadSecret, "no_pem.crt")),
        ] {
            let keywords = format!("user=certified sslmode=require sslcert={certificate} sslkey={key}");
            server.check(&keywords, "", expected).await;
        }
        let none = Refused(Code::BadCredentials, "client certificate");
        server.check("user=certified sslmode=require", "", none).await;
    }
}

#[tokio::test]
async fn the_next_host_is_tried_when_one_is_away_but_not_when_it_refuses() {
    let (version, _) = versions()[0];
    let cluster = own_cluster(version, &[]);
    let (open, closed) = (cluster.port(), sitepair::cli::demo::cluster::free_port().unwrap());
    let connect = async |text: String| {
        let info = conninfo::parse(&text).unwrap();
        session::connect(&info, "sitepair test").await.map(|_| ())
    };
    let two = "host=127.0.0.1,127.0.0.1 dbname=postgres connect_timeout=5";
    assert_eq!(connect(format!("{two} user=postgres port={closed},{open}")).await, Ok(()));
    let away = connect(format!("{two} user=postgres port={closed},{closed}")).await.unwrap_err();
    assert_eq!((away.code, away.class()), (Code::Unreachable, Class::Transient));
    assert!(away.what.contains(&closed.to_string()), "{away}");
    let refused = connect(format!("{two} user=unknown port={open},{closed}")).await.unwrap_err();
    assert_eq!(refused.code, Code::BadCredentials, "{refused}");
    assert!(!refused.what.contains(&closed.to_string()), "{refused}");
    let unknown = connect("host=no.such.host.invalid user=postgres".into()).await.unwrap_err();
    assert_eq!(unknown.code, Code::Unreachable, "{unknown}");
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = silent.local_addr().unwrap().port();
    let fault = connect(format!("host=127.0.0.1 port={port} user=postgres connect_timeout=1")).await.unwrap_err();
    assert!(fault.code == Code::Unreachable && fault.what.contains("no answer within 1 s"), "{fault}");
}
