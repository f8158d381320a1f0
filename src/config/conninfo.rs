//! libpq connection strings: keyword/value pairs and `postgresql://` URLs (PostgreSQL manual, section 34.1.1).
//!
//! What is not supported is refused by name, never ignored: an ignored `sslcrl` would be a hole, an ignored `options` a
//! surprise. Differences from libpq: `PG…` environment variables, service files and `~/.pgpass` are not read, and a
//! connection attempt is bounded by 10 s unless `connect_timeout` says otherwise (0 means no bound, as in libpq).

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use super::pipeline::{ChannelBinding, ConnInfo, HostPort, SessionAttrs, SslMode};

/// Keywords that a connection string may hold.
pub const SUPPORTED: &[&str] = &[
    "host",
    "hostaddr",
    "port",
    "dbname",
    "user",
    "sslmode",
    "sslrootcert",
    "sslcert",
    "sslkey",
    "channel_binding",
    "connect_timeout",
    "application_name",
    "target_session_attrs",
];

/// Where a server listens when no host is named (Debian's directory, libpq's compiled-in default there).
const DEFAULT_HOST: &str = "/var/run/postgresql";
const DEFAULT_PORT: u16 = 5432;
const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

type Pairs = BTreeMap<&'static str, String>;

/// Parses a connection string of either form and fills in libpq's defaults: port 5432, host `/var/run/postgresql`, the
/// operating system's user, and the user's name as the database.
///
/// # Errors
/// One line that names the keyword and the remedy; it never repeats a password.
pub fn parse(text: &str) -> Result<ConnInfo, String> {
    let pairs = match text.strip_prefix("postgresql://").or_else(|| text.strip_prefix("postgres://")) {
        Some(rest) => url_pairs(rest)?,
        None => keyword_pairs(text)?,
    };
    build(pairs)
}

fn insert(pairs: &mut Pairs, keyword: &str, value: String) -> Result<(), String> {
    if keyword == "password" {
        return Err(
            "a password in a connection string is refused; put it into a file and name it by password_file".into()
        );
    }
    if keyword == "passfile" {
        return Err("the keyword \"passfile\" is not supported; put the password alone into a file and name it by \
                    password_file"
            .into());
    }
    let Some(known) = SUPPORTED.iter().find(|known| **known == keyword) else {
        return Err(format!("the keyword \"{keyword}\" is not supported; supported are {}", SUPPORTED.join(", ")));
    };
    pairs.insert(known, value);
    Ok(())
}

/// `keyword = value` pairs: blanks around `=` are optional, a value with blanks is in single quotes, `\` escapes `'` and `\`.
fn keyword_pairs(text: &str) -> Result<Pairs, String> {
    let mut pairs = Pairs::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let name_end = rest.find(|c: char| c == '=' || c.is_whitespace()).unwrap_or(rest.len());
        let (keyword, after) = rest.split_at(name_end);
        let Some(value_start) = after.trim_start().strip_prefix('=').filter(|_| !keyword.is_empty()) else {
            return Err(format!(
                "\"=\" is missing after \"{keyword}\"; write keyword=value pairs, or a postgresql:// URL"
            ));
        };
        let (value, next) = keyword_value(value_start.trim_start(), keyword)?;
        insert(&mut pairs, keyword, value)?;
        rest = next.trim_start();
    }
    Ok(pairs)
}

/// The value at the start of `text`, and what follows it.
fn keyword_value<'a>(text: &'a str, keyword: &str) -> Result<(String, &'a str), String> {
    let (quoted, body) = text.strip_prefix('\'').map_or((false, text), |body| (true, body));
    let mut value = String::new();
    let mut chars = body.char_indices();
    while let Some((position, c)) = chars.next() {
        match c {
            '\\' => match chars.next() {
                Some((_, escaped)) => value.push(escaped),
                None => return Err(format!("the value of \"{keyword}\" ends in a single backslash")),
            },
            '\'' if quoted => return Ok((value, &body[position + 1..])),
            _ if !quoted && c.is_whitespace() => return Ok((value, &body[position..])),
            _ => value.push(c),
        }
    }
    if quoted { Err(format!("the quoted value of \"{keyword}\" has no closing quote")) } else { Ok((value, "")) }
}

/// What follows `postgresql://`: `[user@][host[:port],…][/dbname][?keyword=value&…]`.
fn url_pairs(rest: &str) -> Result<Pairs, String> {
    let mut pairs = Pairs::new();
    let (address, query) = rest.split_once('?').map_or((rest, None), |(address, query)| (address, Some(query)));
    let (authority, dbname) = address.split_once('/').map_or((address, None), |(host, name)| (host, Some(name)));
    let (user, hosts) = authority.split_once('@').map_or((None, authority), |(user, hosts)| (Some(user), hosts));
    if let Some(user) = user {
        if user.contains(':') {
            insert(&mut pairs, "password", String::new())?;
        }
        insert(&mut pairs, "user", decode(user)?)?;
    }
    if let Some(dbname) = dbname.filter(|name| !name.is_empty()) {
        insert(&mut pairs, "dbname", decode(dbname)?)?;
    }
    if !hosts.is_empty() {
        let (hosts, ports): (Vec<_>, Vec<_>) =
            hosts.split(',').map(url_host).collect::<Result<Vec<_>, _>>()?.into_iter().unzip();
        insert(&mut pairs, "host", hosts.join(","))?;
        if ports.iter().any(|port| !port.is_empty()) {
            insert(&mut pairs, "port", ports.join(","))?;
        }
    }
    for pair in query.into_iter().flat_map(|query| query.split('&')).filter(|pair| !pair.is_empty()) {
        let (keyword, value) =
            pair.split_once('=').ok_or_else(|| "a query parameter of the URL lacks its \"=\"".to_owned())?;
        let (keyword, value) = (decode(keyword)?, decode(value)?);
        match (keyword.as_str(), value.as_str()) {
            // JDBC's spelling, which libpq accepts too.
            ("ssl", "true") => insert(&mut pairs, "sslmode", "require".into())?,
            _ => insert(&mut pairs, &keyword, value)?,
        }
    }
    Ok(pairs)
}

/// `host`, `host:port` or `[IPv6]:port` as (host, port), the port empty where none is given.
fn url_host(text: &str) -> Result<(String, String), String> {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (host, after) =
                rest.split_once(']').ok_or_else(|| "an IPv6 address in the URL lacks its \"]\"".to_owned())?;
            match after.strip_prefix(':') {
                Some(port) => (host, port),
                None if after.is_empty() => (host, ""),
                None => return Err(format!("\"{after}\" after an IPv6 address in the URL; only :port may follow")),
            }
        }
        None => text.split_once(':').unwrap_or((text, "")),
    };
    Ok((decode(host)?, decode(port)?))
}

/// Percent decoding (RFC 3986, section 2.1); `%00` is refused as libpq does.
fn decode(text: &str) -> Result<String, String> {
    let bad = || "a percent sign in the URL is not followed by two hexadecimal digits other than 00".to_owned();
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        rest = tail;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let digits = tail.get(..2).filter(|digits| digits.iter().all(u8::is_ascii_hexdigit)).ok_or_else(bad)?;
        let value = u8::from_str_radix(&String::from_utf8_lossy(digits), 16).map_err(|_| bad())?;
        if value == 0 {
            return Err(bad());
        }
        bytes.push(value);
        rest = &tail[2..];
    }
    String::from_utf8(bytes).map_err(|_| "the URL's percent escapes are not UTF-8".to_owned())
}

fn build(mut pairs: Pairs) -> Result<ConnInfo, String> {
    let hosts = hosts(&mut pairs)?;
    let mut take = |keyword: &str| pairs.remove(keyword).filter(|value| !value.is_empty());
    let user =
        take("user").or_else(os_user).ok_or("no user is named, and this process's user has no name; add user=")?;
    let sslrootcert = take("sslrootcert");
    let system_roots = sslrootcert.as_deref() == Some("system");
    let sslmode = match take("sslmode").as_deref() {
        None if system_roots => SslMode::VerifyFull,
        None | Some("prefer") => SslMode::Prefer,
        Some("disable") => SslMode::Disable,
        Some("allow") => SslMode::Allow,
        Some("require") => SslMode::Require,
        Some("verify-ca") => SslMode::VerifyCa,
        Some("verify-full") => SslMode::VerifyFull,
        Some(other) => return Err(choice("sslmode", other, "disable, allow, prefer, require, verify-ca, verify-full")),
    };
    if system_roots && sslmode != SslMode::VerifyFull {
        return Err(
            "sslrootcert=system trusts any public authority, so a weaker sslmode may not be used with it; use \
                    sslmode=verify-full"
                .into(),
        );
    }
    let channel_binding = match take("channel_binding").as_deref() {
        None | Some("prefer") => ChannelBinding::Prefer,
        Some("disable") => ChannelBinding::Disable,
        Some("require") => ChannelBinding::Require,
        Some(other) => return Err(choice("channel_binding", other, "disable, prefer, require")),
    };
    let target_session_attrs = match take("target_session_attrs").as_deref() {
        None | Some("any") => SessionAttrs::Any,
        Some("read-write") => SessionAttrs::ReadWrite,
        Some(other) => return Err(choice("target_session_attrs", other, "any, read-write")),
    };
    let connect_timeout = match take("connect_timeout").map(|text| text.parse::<i32>()) {
        None => DEFAULT_CONNECT_TIMEOUT,
        Some(Ok(seconds)) if seconds > 0 => Duration::from_secs(u64::from(seconds.unsigned_abs())),
        Some(Ok(_)) => Duration::MAX,
        Some(Err(_)) => return Err("connect_timeout is not a whole number of seconds".into()),
    };
    Ok(ConnInfo {
        hosts,
        dbname: take("dbname").unwrap_or_else(|| user.clone()),
        user,
        password: None,
        sslmode,
        sslrootcert,
        sslcert: take("sslcert").map(PathBuf::from),
        sslkey: take("sslkey").map(PathBuf::from),
        channel_binding,
        connect_timeout,
        application_name: take("application_name"),
        target_session_attrs,
    })
}

fn choice(keyword: &str, value: &str, allowed: &str) -> String {
    format!("{keyword}={value} is not supported; supported are {allowed}")
}

/// `host`, `hostaddr` and `port` are comma-separated lists of one length; a single port serves all.
fn hosts(pairs: &mut Pairs) -> Result<Vec<HostPort>, String> {
    let mut list = |keyword: &str| -> Vec<String> {
        let text = pairs.remove(keyword).filter(|text| !text.is_empty());
        text.map(|text| text.split(',').map(|item| item.trim().to_owned()).collect()).unwrap_or_default()
    };
    let (names, addresses, ports) = (list("host"), list("hostaddr"), list("port"));
    let count = names.len().max(addresses.len()).max(1);
    if !names.is_empty() && !addresses.is_empty() && names.len() != addresses.len() {
        return Err(format!("{} hosts but {} hostaddr values; give as many", names.len(), addresses.len()));
    }
    if ports.len() > 1 && ports.len() != count {
        return Err(format!("{} ports for {count} hosts; give one port, or one for each host", ports.len()));
    }
    let present = |item: Option<&String>| item.filter(|item| !item.is_empty()).cloned();
    let mut hosts = Vec::with_capacity(count);
    for position in 0..count {
        let hostaddr = present(addresses.get(position));
        if let Some(address) = hostaddr.as_deref().filter(|address| address.parse::<std::net::IpAddr>().is_err()) {
            return Err(format!("hostaddr \"{address}\" is not a numeric address; put a name into host"));
        }
        let host = present(names.get(position)).or_else(|| hostaddr.clone()).unwrap_or_else(|| DEFAULT_HOST.to_owned());
        let port = match present(ports.get(position).or_else(|| ports.first())) {
            None => DEFAULT_PORT,
            Some(text) => text
                .parse()
                .ok()
                .filter(|port| *port != 0)
                .ok_or_else(|| format!("port \"{text}\" is not a number from 1 to 65535"))?,
        };
        hosts.push(HostPort { host, hostaddr, port });
    }
    Ok(hosts)
}

/// The effective user's name in the password database.
fn os_user() -> Option<String> {
    let uid = rustix::process::geteuid().as_raw().to_string();
    let passwd = fs::read_to_string("/etc/passwd").ok()?;
    let mut names = passwd.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == uid).then(|| name.to_owned())
    });
    names.next().or_else(|| std::env::var("USER").ok()).filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(host: &str, port: u16) -> HostPort {
        HostPort { host: host.into(), hostaddr: None, port }
    }

    #[test]
    fn hosts_users_and_databases() {
        let check = |text: &str, expected: &str| {
            let info = parse(text).unwrap_or_else(|words| panic!("{text:?}: {words}"));
            assert_eq!(info.to_string(), expected, "{text:?}");
        };
        for (text, expected) in [
            ("host=db user=u", "u@db:5432/u"),
            ("user=u", "u@/var/run/postgresql:5432/u"),
            ("host = db  port = 5433\tuser =u\ndbname= d ", "u@db:5433/d"),
            ("host=a,b,c port=1,,3 user=u", "u@a:1,b:5432,c:3/u"),
            ("host=a,b port=7 user=u", "u@a:7,b:7/u"),
            ("host=a, port=7 user=u", "u@a:7,/var/run/postgresql:7/u"),
            (r"user='o\'hara \\ x' dbname='a b' host=/tmp", r"o'hara \ x@/tmp:5432/a b"),
            (r"user=o\'hara\ x host=h", "o'hara x@h:5432/o'hara x"),
            ("user=u dbname='' host=h", "u@h:5432/u"),
            ("user=a user=b host=h", "b@h:5432/b"),
            ("host=h user=u dbname=a=b", "u@h:5432/a=b"),
            ("hostaddr=10.0.0.1 user=u", "u@10.0.0.1:5432/u"),
            ("postgresql://u@h", "u@h:5432/u"),
            ("postgres://u@h:1/d", "u@h:1/d"),
            ("postgresql://u@h/", "u@h:5432/u"),
            ("postgresql:///d?user=u", "u@/var/run/postgresql:5432/d"),
            ("postgresql://u@a:1,b,[::1]:3/d", "u@a:1,b:5432,::1:3/d"),
            ("postgresql://%75%20x@%2Ftmp%2Fs:6/my%2Fdb", "u x@/tmp/s:6/my/db"),
            ("postgresql://u@/d?host=/tmp&port=99", "u@/tmp:99/d"),
            ("postgresql://u@h/d?dbname=e", "u@h:5432/e"),
        ] {
            check(text, expected);
        }
    }

    #[test]
    fn every_keyword_reaches_its_field() {
        let text = "host=h hostaddr=::1 port=1 dbname=d user=u sslmode=verify-ca sslrootcert=/r sslcert=/c sslkey=/k \
                    channel_binding=require connect_timeout=3 application_name='a b' target_session_attrs=read-write";
        let expected = ConnInfo {
            hosts: vec![HostPort { hostaddr: Some("::1".into()), ..host("h", 1) }],
            dbname: "d".into(),
            user: "u".into(),
            password: None,
            sslmode: SslMode::VerifyCa,
            sslrootcert: Some("/r".into()),
            sslcert: Some("/c".into()),
            sslkey: Some("/k".into()),
            channel_binding: ChannelBinding::Require,
            connect_timeout: Duration::from_secs(3),
            application_name: Some("a b".into()),
            target_session_attrs: SessionAttrs::ReadWrite,
        };
        assert_eq!(parse(text), Ok(expected.clone()));
        let url = "postgresql://u@h:1/d?hostaddr=::1&sslmode=verify-ca&sslrootcert=/r&sslcert=/c&sslkey=/k\
                   &channel_binding=require&connect_timeout=3&application_name=a%20b&target_session_attrs=read-write";
        assert_eq!(parse(url), Ok(expected));
    }

    #[test]
    fn defaults_are_libpqs() {
        let info = parse("").expect("all have defaults");
        assert_eq!(info.hosts, [host("/var/run/postgresql", 5432)]);
        assert_eq!(info.dbname, info.user);
        assert_eq!((info.sslmode, info.channel_binding), (SslMode::Prefer, ChannelBinding::Prefer));
        assert_eq!(info.connect_timeout, DEFAULT_CONNECT_TIMEOUT);
        assert_eq!(parse("user=u connect_timeout=0").map(|info| info.connect_timeout), Ok(Duration::MAX));
        assert_eq!(parse("user=u sslrootcert=system").map(|info| info.sslmode), Ok(SslMode::VerifyFull));
        assert_eq!(parse("postgresql://u@h?ssl=true").map(|info| info.sslmode), Ok(SslMode::Require));
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        for (text, words) in [
            ("user=u password=hunter2", "password_file"),
            ("postgresql://u:hunter2@h", "password_file"),
            ("postgresql://u@h?password=hunter2", "password_file"),
            ("passfile=/x", "password_file"),
            ("options=-c", "\"options\" is not supported; supported are host, hostaddr"),
            ("sslcrl=/x", "\"sslcrl\""),
            ("service=x", "\"service\""),
            ("Host=h", "\"Host\""),
            ("host", "\"=\" is missing after \"host\""),
            ("=h", "\"=\" is missing"),
            ("user='u", "no closing quote"),
            ("user=u\\", "single backslash"),
            ("sslmode=on", "sslmode=on is not supported; supported are disable"),
            ("sslrootcert=system sslmode=require", "sslmode=verify-full"),
            ("channel_binding=maybe", "disable, prefer, require"),
            ("target_session_attrs=standby", "any, read-write"),
            ("connect_timeout=soon", "whole number"),
            ("port=0", "port \"0\""),
            ("port=65536", "port \"65536\""),
            ("host=a,b port=1,2,3", "3 ports for 2 hosts"),
            ("host=a,b hostaddr=::1", "2 hosts but 1 hostaddr"),
            ("hostaddr=localhost", "not a numeric address"),
            ("postgresql://u@[::1", "lacks its \"]\""),
            ("postgresql://u@[::1]x", "only :port may follow"),
            ("postgresql://u@h?sslmode", "lacks its \"=\""),
            ("postgresql://u@%zz", "hexadecimal"),
            ("postgresql://u@h%00", "hexadecimal"),
            ("postgresql://u@h%2", "hexadecimal"),
            ("postgresql://u@%ff", "UTF-8"),
        ] {
            let refusal = parse(text).expect_err(text);
            assert!(refusal.contains(words), "{text:?}: {refusal}");
            assert!(!refusal.contains("hunter2"), "{refusal}");
        }
    }
}
