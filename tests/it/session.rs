//! Logins: `sslmode`, certificates, SCRAM, pinned settings.

use crate::support::{database, versions};
use sitepair::config::conninfo;
use sitepair::postgres::session;

#[tokio::test]
async fn a_session_knows_its_server() {
    for (version, _) in versions() {
        let database = database(*version, 0);
        let info = conninfo::parse(&database.conninfo()).unwrap();
        let session = session::connect(&info, "sitepair test").await.unwrap();
        assert_eq!(session.version / 10_000, *version);
        let row = session.query_one("select pg_backend_pid(), current_setting('application_name')", &[]).await.unwrap();
        assert_eq!(u32::try_from(row.get::<_, i32>(0)).unwrap(), session.backend_pid);
        assert_eq!(row.get::<_, &str>(1), "sitepair test");
        assert!(!session.tls);
    }
}
