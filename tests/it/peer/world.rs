//! A node that serves the topic of one flow, and what is needed to dial it.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use sitepair::config::{self, Dial, Overrides, Pipeline, Tls};
use sitepair::model::FlowName;
use sitepair::pipeline::board::Board;
use sitepair::topic::embedded::WriterOptions;
use sitepair::topic::peer::{Access, Reader};
use sitepair::web::{Health, Server, Serving};
use tempfile::TempDir;
use tokio::sync::watch;

/// What the server demands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Demands {
    /// A token, over plain HTTP on a loopback address.
    Token,
    /// A token, over TLS.
    TokenOverTls,
    /// A client certificate.
    Certificate,
}

/// A served topic. The server ends with it.
pub struct World {
    pub dir: TempDir,
    pub address: SocketAddr,
    pub dial: Dial,
    pub stop: watch::Sender<bool>,
}

pub fn flow() -> FlowName {
    FlowName { pipeline: "mssp".into(), lane: None, from: "a".into(), to: "b".into(), shared: false }
}

/// Retention that drops whatever it may.
pub fn options() -> WriterOptions {
    WriterOptions {
        retention_age: std::time::Duration::ZERO,
        lock_patience: std::time::Duration::from_secs(1),
        ..WriterOptions::default()
    }
}

/// Writes a file that only its owner may read.
pub fn secret(path: &Path, text: &str) -> PathBuf {
    fs::write(path, text).expect("writable");
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).expect("own file");
    path.to_owned()
}

/// Makes an authority `NAME_ca.pem`, and a certificate `NAME.pem` for 127.0.0.1 and localhost with its key `NAME.key`.
pub fn certificate(dir: &Path, name: &str) -> Tls {
    let ca_key = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, format!("{name} authority"));
    let ca = params.self_signed(&ca_key).expect("signed");
    let issuer = Issuer::new(params, ca_key);
    let key = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::new(["localhost".to_owned(), "127.0.0.1".to_owned()]).expect("names");
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let certificate = params.signed_by(&key, &issuer).expect("signed");
    Tls {
        cert: Some(secret(&dir.join(format!("{name}.pem")), &certificate.pem())),
        key: Some(secret(&dir.join(format!("{name}.key")), &key.serialize_pem())),
        ca: Some(secret(&dir.join(format!("{name}_ca.pem")), &ca.pem())),
    }
}

/// The pipeline file of two sites whose databases are never dialled; `served` is what site a serves by.
pub fn pipeline(dir: &Path, served: &str) -> Pipeline {
    let file = dir.join("pair.toml");
    let text = format!(
        "pipeline = \"mssp\"\nflows = [\"a -> b\"]\n[site.a]\npostgres = \"host=127.0.0.1 user=u dbname=a\"\n{served}\n\
         [site.b]\npostgres = \"host=127.0.0.1 user=u dbname=b\"\n[[tables]]\ninclude = [\"public.t\"]\n\
         [topic]\nkind = \"peer\"\npath = \"topic\"\n"
    );
    fs::write(&file, text).expect("writable");
    config::load(&file, &Overrides::default()).unwrap_or_else(|problems| panic!("{problems:?}"))
}

impl World {
    pub async fn start(demands: Demands) -> World {
        let work = tempfile::tempdir().expect("a directory");
        let dir = &work;
        let token_file = secret(&dir.path().join("token"), "correct horse battery staple\n");
        let (a, b) = (certificate(dir.path(), "a"), certificate(dir.path(), "b"));
        let (served, token_file, own, theirs) = match demands {
            Demands::Token => ("token_file = \"token\"", Some(token_file), Tls::default(), Tls::default()),
            Demands::TokenOverTls => (
                "token_file = \"token\"\ntls = { cert = \"a.pem\", key = \"a.key\" }",
                Some(token_file),
                Tls { ca: a.ca.clone(), ..Tls::default() },
                Tls::default(),
            ),
            Demands::Certificate => (
                "tls = { cert = \"a.pem\", key = \"a.key\", ca = \"b_ca.pem\" }",
                None,
                Tls { ca: a.ca.clone(), ..b },
                Tls::default(),
            ),
        };
        let site = format!("listen = \"127.0.0.1:0\"\nurl = \"https://127.0.0.1:1\"\n{served}");
        let pipeline = pipeline(dir.path(), &site);
        let health = Health { board: Board::default(), limit: pipeline.tuning.liveness_timeout };
        let (dir, flows) = (pipeline.topic.path.clone(), pipeline.flows.clone());
        let serving = Serving { dir, flows, health, meter: None };
        let server = Server::bind(&pipeline.sites["a"], serving).await.expect("binds").expect("listens");
        let address = server.address().expect("bound");
        let (stop, stopped) = watch::channel(false);
        tokio::spawn(server.serve(stopped));
        let scheme = if demands == Demands::Token { "http" } else { "https" };
        let dial = Dial { url: format!("{scheme}://{address}"), token_file, own, theirs };
        let dir = work;
        World { dir, address, dial, stop }
    }

    /// Directory of the topic.
    pub fn topic(&self) -> PathBuf {
        self.dir.path().join("topic")
    }

    /// A reader that dials by `dial`.
    pub fn reader(dial: &Dial) -> Reader {
        Reader::new(Arc::new(Access::new(dial).expect("usable")), &flow(), None)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.stop.send_replace(true);
    }
}
