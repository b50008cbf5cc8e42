//! The witness in etcd (3.4 or later; one server or a cluster): one key per protection, no lease, so it stays until it is changed.
//!
//! Reads are linearizable. A swap is a transaction that compares the key's mod revision and its whole value. Each endpoint has a
//! connection of its own and they are tried in turn, beginning with the one that answered last; a connection that gave no answer is
//! forgotten.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use etcd_client::{
    Certificate, Client, Compare, CompareOp, ConnectOptions, Identity, ResponseHeader, TlsOptions, Txn, TxnOp,
};

use super::client::{CasReply, ReadError};
use super::config::{ConfigError, EtcdConfig};
use super::record::{Position, Record, Versioned};
use super::store::WitnessStore;
use crate::ids::ProtectionId;

/// See the module.
pub struct EtcdStore {
    endpoints: Vec<Endpoint>,
    options: ConnectOptions,
    prefix: String,
    timeout: Duration,
    /// The endpoint that answered last.
    preferred: Mutex<usize>,
}

struct Endpoint {
    url: String,
    /// `None` until needed, and again after anything but an answer: a connection that swallows one request swallows the next.
    client: Mutex<Option<Client>>,
}

impl EtcdStore {
    /// Reads certificates and password; connects only when first asked something.
    ///
    /// # Errors
    /// [`ConfigError`] if a file cannot be read or the settings contradict each other.
    pub fn new(config: &EtcdConfig) -> Result<Self, ConfigError> {
        config.check()?;
        let timeout = Duration::from_millis(config.timeout_ms);
        let mut options =
            ConnectOptions::new().with_connect_timeout(timeout).with_require_leader(true).with_auto_token_refresh(true);
        if let (Some(user), Some(file)) = (&config.user, &config.password_file) {
            let password = String::from_utf8(read(file)?)
                .map_err(|e| ConfigError::File { path: file.clone(), text: e.to_string() })?;
            options = options.with_user(user, password.trim_end_matches(['\r', '\n']));
        }
        if config.endpoints.iter().any(|e| e.starts_with("https:")) {
            let mut tls = TlsOptions::new();
            if let Some(ca) = &config.ca {
                tls = tls.ca_certificate(Certificate::from_pem(read(ca)?));
            }
            if let (Some(cert), Some(key)) = (&config.cert, &config.key) {
                tls = tls.identity(Identity::from_pem(read(cert)?, read(key)?));
            }
            options = options.with_tls(tls);
        }
        let endpoints =
            config.endpoints.iter().map(|e| Endpoint { url: e.clone(), client: Mutex::default() }).collect();
        let prefix = config.prefix.clone();
        Ok(Self { endpoints, options, prefix, timeout, preferred: Mutex::new(0) })
    }

    fn key(&self, protection: ProtectionId) -> String {
        format!("{}{protection}", self.prefix)
    }

    fn preferred(&self) -> usize {
        *self.preferred.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks one endpoint. Without an answer its connection is forgotten.
    async fn ask<T>(
        &self,
        n: usize,
        request: impl AsyncFnOnce(&mut Client) -> Result<T, etcd_client::Error>,
    ) -> Result<T, String> {
        let endpoint = &self.endpoints[n];
        let kept = || endpoint.client.lock().unwrap_or_else(PoisonError::into_inner);
        let known = kept().take();
        let answer = tokio::time::timeout(self.timeout, async {
            let mut client = match known {
                Some(client) => client,
                None => Client::connect([&endpoint.url], Some(self.options.clone())).await?,
            };
            request(&mut client).await.map(|answer| (answer, client))
        });
        match answer.await {
            Ok(Ok((answer, client))) => {
                *kept() = Some(client);
                Ok(answer)
            }
            Ok(Err(e)) => Err(format!("{}: {}", endpoint.url, chain(&e))),
            Err(_) => Err(format!("{}: no answer within {} ms", endpoint.url, self.timeout.as_millis())),
        }
    }

    /// Reads at the first endpoint that answers, beginning with the one that did last.
    async fn get(&self, key: &str) -> Result<etcd_client::GetResponse, String> {
        let first = self.preferred();
        let mut errors = vec![];
        for i in 0..self.endpoints.len() {
            let n = (first + i) % self.endpoints.len();
            match self.ask(n, async |c| c.get(key, None).await).await {
                Ok(answer) => {
                    *self.preferred.lock().unwrap_or_else(PoisonError::into_inner) = n;
                    return Ok(answer);
                }
                Err(e) => errors.push(e),
            }
        }
        Err(errors.join("; "))
    }
}

fn read(path: &Path) -> Result<Vec<u8>, ConfigError> {
    std::fs::read(path).map_err(|e| ConfigError::File { path: PathBuf::from(path), text: e.to_string() })
}

/// What went wrong, and why: tonic says "transport error" and leaves the rest to the sources.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(e) = source {
        let more = e.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        source = e.source();
    }
    text
}

fn position(header: Option<&ResponseHeader>, modified: i64) -> Option<Position> {
    let header = header?;
    Some(Position {
        store: format!("etcd cluster {:016x}", header.cluster_id()),
        revision: u64::try_from(header.revision()).ok()?,
        modified: u64::try_from(modified).ok()?,
    })
}

#[async_trait]
impl WitnessStore for EtcdStore {
    async fn read(&self, protection: ProtectionId) -> Result<Versioned, ReadError> {
        let answer = self.get(&self.key(protection)).await.map_err(ReadError::Unavailable)?;
        let found = answer.kvs().first();
        let position = position(answer.header(), found.map_or(0, |kv| kv.mod_revision()))
            .ok_or_else(|| ReadError::Unavailable("it answered without a revision".into()))?;
        let record = found.map(|kv| Record::from_json(protection, kv.value())).transpose();
        Ok(Versioned { record: record.map_err(ReadError::Unreadable)?, position })
    }

    async fn cas(&self, protection: ProtectionId, expected: &Versioned, new: &Record) -> CasReply {
        let key = self.key(protection);
        let Ok(modified) = i64::try_from(expected.position.modified) else { return CasReply::Conflict };
        let mut compares = vec![Compare::mod_revision(key.as_str(), CompareOp::Equal, modified)];
        if let Some(r) = &expected.record {
            compares.push(Compare::value(key.as_str(), CompareOp::Equal, r.to_json()));
        }
        let txn = Txn::new().when(compares).and_then([TxnOp::put(key.as_str(), new.to_json(), None)]);
        // At one endpoint only, the one that was read from: what is not certain is read again, and that finds the next one.
        match self.ask(self.preferred(), async |c| c.txn(txn).await).await {
            Ok(answer) if answer.succeeded() => {
                let revision = answer.header().map_or(-1, ResponseHeader::revision);
                match position(answer.header(), revision) {
                    Some(position) => CasReply::Applied(position),
                    None => CasReply::Unknown("it answered without a revision".into()),
                }
            }
            Ok(_) => CasReply::Conflict,
            Err(text) => CasReply::Unknown(text),
        }
    }

    async fn probe(&self) -> Result<Position, String> {
        // A key that is never written, within what the user may read.
        let answer = self.get(&format!("{}probe", self.prefix)).await?;
        position(answer.header(), 0).ok_or_else(|| "it answered without a revision".into())
    }

    fn describe(&self) -> String {
        let urls: Vec<_> = self.endpoints.iter().map(|e| e.url.as_str()).collect();
        format!("etcd at {}", urls.join(", "))
    }
}
