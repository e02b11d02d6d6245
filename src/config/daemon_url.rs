//! `daemon.url`: where a daemon on another machine is reached.

use std::net::IpAddr;

/// A URL of the API over TCP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DaemonUrl {
    pub tls: bool,
    /// A name, or an address without brackets.
    pub host: String,
    pub port: u16,
}

impl DaemonUrl {
    /// Parses `https://HOST:PORT`, or `http://` and an address of this machine itself; says what is wrong.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        let (tls, rest) = match (text.strip_prefix("https://"), text.strip_prefix("http://")) {
            (Some(rest), _) => (true, rest),
            (_, Some(rest)) => (false, rest),
            _ => return Err("does not begin with https:// (or http://, for this machine itself)"),
        };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let parts = rest.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse::<u16>().ok()?)));
        let Some((host, port)) = parts.filter(|(host, port)| !host.is_empty() && *port != 0) else {
            return Err("names no host and port, such as https://node5:7072");
        };
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        match bare {
            Some(address) if address.parse::<std::net::Ipv6Addr>().is_err() => {
                return Err("has no address in its brackets");
            }
            None if !host.chars().all(is_plain) => return Err("is more than a host and a port"),
            _ => {}
        }
        let host = bare.unwrap_or(host).to_owned();
        let is_here = host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
        if !tls && !is_here {
            return Err("would show the token on the network: use https://");
        }
        Ok(Self { tls, host, port })
    }

    /// Gives host and port as a header has them.
    pub fn authority(&self) -> String {
        match self.host.contains(':') {
            true => format!("[{}]:{}", self.host, self.port),
            false => format!("{}:{}", self.host, self.port),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::DaemonUrl;

    #[test]
    fn a_daemons_url_is_a_scheme_a_host_and_a_port() {
        for (text, tls, authority) in [
            ("https://node5:7072", true, "node5:7072"),
            ("https://[fe80::1]:7072/", true, "[fe80::1]:7072"),
            ("http://127.0.0.1:80", false, "127.0.0.1:80"),
            ("http://[::1]:80", false, "[::1]:80"),
        ] {
            let url = DaemonUrl::parse(text).expect(text);
            assert_eq!((url.tls, url.authority().as_str()), (tls, authority), "{text}");
        }
    }

    #[test]
    fn a_url_that_shows_the_token_or_says_more_is_refused() {
        for (text, why) in [
            ("node5:7072", "https://"),
            ("http://node5:7072", "token"),
            ("http://10.0.0.5:7072", "token"),
            ("https://node5", "port"),
            ("https://:7072", "host"),
            ("https://node5:0", "port"),
            ("https://ada:secret@node5:7072", "more than"),
            ("https://node5/x:7072", "more than"),
            ("https://[node5]:7072", "brackets"),
        ] {
            let told = DaemonUrl::parse(text).expect_err(text);
            assert!(told.contains(why), "{text}: {told}");
        }
    }
}
