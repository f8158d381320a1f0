//! What an error of the server means for a flow: one table over SQLSTATE (PostgreSQL manual, appendix A).
//!
//! The line that matters most: an error that is not in the data (a broken connection, a full disk, a missing right) is
//! never taken for one that is, since a data error may set a change aside.

use std::error::Error as _;
use std::io;

use crate::model::{Code, Fault};

/// What kind of trouble a SQLSTATE is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The connection failed: class 08.
    Connection,
    /// The server is starting, stopping, in recovery, short of connections or memory, or a person cancelled.
    Busy,
    /// Deadlock, serialization failure, lock timeout: the same transaction may succeed when tried again.
    Contention,
    /// A right is missing.
    Right,
    /// The login was refused, or the database does not exist.
    Login,
    /// A value or a row is not acceptable to the table, its constraints or its triggers.
    Data,
    /// A table, column, type or index is not what the statement expects.
    Shape,
    /// The server's disk is full.
    DiskFull,
    /// A server setting or state forbids it.
    Setting,
    /// The object is in use by another session: a slot or an origin.
    InUse,
    /// Anything else: a bug, corruption, an unsupported feature.
    Other,
}

/// The kind of a SQLSTATE: exact codes first, then its class.
pub fn kind(sqlstate: &str) -> Kind {
    match sqlstate {
        // cannot_connect_now and its kin, query_canceled, idle limits, read-only (a standby that is to be promoted).
        "57P01" | "57P02" | "57P03" | "57P05" | "57014" | "53300" | "53200" | "25006" | "25P03" | "25P04" => Kind::Busy,
        "40001" | "40P01" | "40003" | "40000" | "55P03" => Kind::Contention,
        "42501" => Kind::Right,
        "57P04" | "3D000" => Kind::Login,
        "53100" => Kind::DiskFull,
        "55006" => Kind::InUse,
        // undefined table, column, object, schema; ON CONFLICT without an index; identity column that can't be set.
        "42P01" | "42703" | "42704" | "3F000" | "42P10" | "428C9" | "42809" => Kind::Shape,
        // Input that does not fit the column's type; a view's WITH CHECK OPTION; a trigger's RAISE; an index row too large.
        "42804" | "42846" | "44000" | "40002" | "54000" => Kind::Data,
        "55000" | "53400" | "55P02" => Kind::Setting,
        _ => match sqlstate.get(..2).unwrap_or_default() {
            "08" => Kind::Connection,
            "22" | "23" | "38" | "39" | "P0" => Kind::Data,
            "28" => Kind::Login,
            "53" => Kind::Busy,
            "40" => Kind::Contention,
            _ => Kind::Other,
        },
    }
}

/// The fault code that stands for a kind.
pub fn code(kind: Kind) -> Code {
    match kind {
        Kind::Connection => Code::Unreachable,
        Kind::Busy => Code::ServerBusy,
        Kind::Contention => Code::Contention,
        Kind::Right => Code::MissingRight,
        Kind::Login => Code::BadCredentials,
        Kind::Data => Code::DataError,
        Kind::Shape => Code::ShapeMismatch,
        Kind::DiskFull => Code::ServerDiskFull,
        Kind::Setting => Code::BadSetting,
        Kind::InUse | Kind::Other => Code::Sql,
    }
}

/// True when the server refused the row or the value itself; false for every error of the connection or the server.
pub fn is_data_error(error: &tokio_postgres::Error) -> bool {
    error.code().is_some_and(|state| kind(state.code()) == Kind::Data)
}

/// An error of a session as a fault: what the server said, without row values.
pub fn fault(error: &tokio_postgres::Error) -> Fault {
    if let Some(reported) = error.as_db_error() {
        let place = [("table", reported.table()), ("column", reported.column()), ("constraint", reported.constraint())];
        let place: Vec<_> =
            place.iter().filter_map(|(kind, name)| name.map(|name| format!("{kind} \"{name}\""))).collect();
        let fault = server_fault(reported.code().code(), reported.message());
        return if place.is_empty() {
            fault
        } else {
            Fault { what: format!("{} ({})", fault.what, place.join(", ")), ..fault }
        };
    }
    let cause = error.source();
    let words = cause.map_or_else(|| error.to_string(), |cause| format!("{error}: {cause}"));
    let broken = error.is_closed() || cause.and_then(|cause| cause.downcast_ref()).is_some_and(is_broken_connection);
    Fault::new(if broken { Code::Unreachable } else { Code::Sql }, words)
}

/// tokio-postgres reports what it could not encode or parse as an I/O error of these kinds too; TLS errors are of the
/// connection whatever their kind.
fn is_broken_connection(error: &io::Error) -> bool {
    let malformed = matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData);
    !malformed || error.get_ref().is_some_and(|inner| inner.is::<rustls::Error>())
}

/// An error that the server reported, as a fault: `message (SQLSTATE)`.
///
/// A message of class 22 quotes the value it is about, so it is cut at its first colon; details and hints, which quote
/// rows, are left out altogether.
pub fn server_fault(sqlstate: &str, message: &str) -> Fault {
    let words = if sqlstate.starts_with("22") { message.split(':').next().unwrap_or_default() } else { message };
    let fault = Fault::new(code(kind(sqlstate)), format!("{words} (SQLSTATE {sqlstate})"));
    match sqlstate {
        "3D000" | "57P04" => fault.remedy("create the database, or correct dbname"),
        "25006" => fault.remedy("the server accepts no writes: promote it, or connect to the primary"),
        "57014" => fault.remedy("nothing, it is tried again; find out who cancelled it"),
        _ => fault,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Class;

    #[test]
    fn each_class_has_its_kind() {
        for (states, expected) in [
            (&["08000", "08006", "08P01"][..], Kind::Connection),
            (&["57P01", "57P02", "57P03", "57014", "53300", "53200", "53000", "25006"], Kind::Busy),
            (&["40001", "40P01", "55P03"], Kind::Contention),
            (&["42501"], Kind::Right),
            (&["28P01", "28000", "3D000"], Kind::Login),
            (
                &[
                    "22001", "22003", "22P02", "22021", "23505", "23502", "23503", "23514", "23P01", "42804", "P0001",
                    "54000",
                ],
                Kind::Data,
            ),
            (&["42P01", "42703", "42704", "3F000", "42P10", "428C9"], Kind::Shape),
            (&["53100"], Kind::DiskFull),
            (&["55000"], Kind::Setting),
            (&["55006"], Kind::InUse),
            (&["XX000", "XX001", "42601", "0A000", "58030", "42883", "", "é"], Kind::Other),
        ] {
            for state in states {
                assert_eq!(kind(state), expected, "{state}");
            }
        }
    }

    #[test]
    fn no_transient_kind_is_a_data_error_and_none_is_a_guard() {
        for kind in [Kind::Connection, Kind::Busy, Kind::Contention, Kind::DiskFull] {
            assert_eq!(code(kind).class(), Class::Transient, "{kind:?}");
        }
        for kind in [Kind::Right, Kind::Login, Kind::Data, Kind::Shape, Kind::Setting, Kind::InUse, Kind::Other] {
            assert_eq!(code(kind).class(), Class::Failed, "{kind:?}");
        }
    }

    #[test]
    fn values_do_not_reach_the_fault() {
        let fault = server_fault("22P02", "invalid input syntax for type integer: \"secret\"");
        assert_eq!(fault.what, "invalid input syntax for type integer (SQLSTATE 22P02)");
        let fault = server_fault("23505", "duplicate key value violates unique constraint \"account_pkey\"");
        assert!(fault.what.contains("account_pkey"));
    }
}
