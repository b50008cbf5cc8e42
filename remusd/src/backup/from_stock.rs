//! UNSAFE interoperation: a stock `xl remus` as the primary. `remusd receive-stock` stands where `xl remus -s` expects
//! `xl migrate-receive -r`, takes the stock stream from standard input and hands it to this host's daemon as a link of its own.
//!
//! The stock primary waits for no acknowledgement, holds no IPv6 or ARP, and knows no generations; but its copy here is never started
//! by an end of the stream (hazard F1): it waits for an operator.

use std::path::PathBuf;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;

use crate::ids::{Epoch, Generation, Nonce, ProtectionId, SessionKey};
use crate::link::{
    EpochEnd, GuestType, LinkError, LinkEvent, LinkOptions, LinkSender, OnPrimaryLoss, PrimaryLink, ProtectOffer,
    Transport,
};
use crate::stream::digest::Digester;
use crate::stream::pull::Chunked;
use crate::stream::session::{SessionEvent, SessionParser};
use crate::stream::{CaptureItem, StreamError, handshake};

/// Heartbeats are ours, not the stock primary's; so the silence that counts is that of this process.
const DETECTION: Duration = Duration::from_secs(5);

/// Why a stock stream was not taken, or not to its end.
#[derive(Debug, thiserror::Error)]
pub enum StockError {
    /// Standard input or output.
    #[error("The stock primary's stream: {0}")]
    Io(#[from] std::io::Error),
    /// Not a stream of xl.
    #[error("The stock primary's stream cannot be understood: {0}")]
    Stream(#[from] StreamError),
    /// This host's daemon.
    #[error("This host's remusd: {0}")]
    Link(#[from] LinkError),
    /// The configuration lacks what is needed.
    #[error("The domain's configuration has no usable {0}")]
    Config(&'static str),
    /// The daemon ended the session.
    #[error("This host's remusd gave the copy up: {0}")]
    Ended(String),
    /// The stream ended before it said which domain it is.
    #[error("The stream ended before the domain's configuration")]
    Short,
}

fn offer(json: &str) -> Result<ProtectOffer, StockError> {
    let config: serde_json::Value = serde_json::from_str(json).map_err(|_| StockError::Config("JSON"))?;
    let text = |path: &str| config.pointer(path).and_then(|v| v.as_str());
    let number = |path: &str| config.pointer(path).and_then(serde_json::Value::as_u64);
    let protection: ProtectionId =
        text("/c_info/uuid").and_then(|u| u.parse().ok()).ok_or(StockError::Config("c_info.uuid"))?;
    Ok(ProtectOffer {
        protection,
        domain: text("/c_info/name").ok_or(StockError::Config("c_info.name"))?.into(),
        max_memory_kib: number("/b_info/max_memkb").ok_or(StockError::Config("b_info.max_memkb"))?,
        vcpus: number("/b_info/max_vcpus").and_then(|n| u32::try_from(n).ok()).unwrap_or(1),
        guest_type: match text("/c_info/type") {
            Some("hvm") => GuestType::Hvm,
            Some("pvh") => GuestType::Pvh,
            _ => return Err(StockError::Config("c_info.type: only HVM and PVH guests can be kept")),
        },
        on_primary_loss: OnPrimaryLoss::Wait,
        detection_ms: u32::try_from(DETECTION.as_millis()).unwrap_or(u32::MAX),
        host_id: ProtectionId::nil(),
        witness: None,
        then: None,
        no_monitor: false,
    })
}

/// How long the last whole epoch may take to be acknowledged after the stock primary has gone.
const LAST_ACK: Duration = Duration::from_secs(30);

/// What the daemon has said so far.
#[derive(Default)]
struct Told {
    acked: Option<Epoch>,
    ended: Option<String>,
}

impl Told {
    fn hear(&mut self, event: LinkEvent) {
        match event {
            LinkEvent::Ack { epoch, .. } => self.acked = Some(epoch),
            LinkEvent::BackupLost { text, .. } | LinkEvent::Superseded { text } => self.ended = Some(text),
            LinkEvent::Closed(reason) if self.ended.is_none() => self.ended = Some(reason.to_string()),
            _ => {}
        }
    }
}

/// One epoch being forwarded.
#[derive(Default)]
struct Open {
    begun: bool,
    digester: Digester,
    pages: u64,
    bytes: u64,
    records: u32,
}

struct Forward {
    link: LinkSender,
    epoch: Epoch,
    open: Open,
}

impl Forward {
    async fn begin(&mut self) -> Result<(), LinkError> {
        if !self.open.begun {
            // The first copy is not armed; every later checkpoint is as good as the stock primary makes it.
            self.link.epoch_begin(self.epoch, self.epoch.0 > 0).await?;
            self.open.begun = true;
        }
        Ok(())
    }

    async fn item(&mut self, item: CaptureItem) -> Result<(), LinkError> {
        match item {
            CaptureItem::Preamble(bytes) => self.link.preamble(bytes).await,
            CaptureItem::Pages(batch) => {
                self.begin().await?;
                self.open.digester.pages(&batch);
                self.open.pages += batch.entries.len() as u64;
                self.open.bytes += batch.data.len() as u64;
                self.link.pages(self.epoch, batch).await
            }
            CaptureItem::State(record) => {
                self.begin().await?;
                self.open.digester.record(&record);
                self.open.records += 1;
                self.open.bytes += record.body.len() as u64;
                self.link.state(self.epoch, record).await
            }
            CaptureItem::EndOfEpoch => {
                self.begin().await?;
                let mut open = std::mem::take(&mut self.open);
                let end = EpochEnd {
                    epoch: self.epoch,
                    armed: self.epoch.0 > 0,
                    digest: open.digester.finish(),
                    pages: open.pages,
                    bytes: open.bytes,
                    records: open.records,
                };
                self.epoch = self.epoch.next();
                self.link.epoch_end(end).await
            }
        }
    }
}

/// Greets like `xl migrate-receive`, then forwards standard input to the daemon at `socket` until it ends. The copy then waits there
/// for `remus failover` or `remus discard`.
///
/// # Errors
/// [`StockError`]; the copy is kept as far as it came.
pub async fn receive(socket: PathBuf) -> Result<(), StockError> {
    let mut stdout = tokio::io::stdout();
    stdout.write_all(handshake::BANNER).await?;
    stdout.flush().await?;
    let mut stdin = tokio::io::stdin();
    let mut parser = Chunked::new(SessionParser::new());
    let mut forward: Option<Forward> = None;
    let (told, mut backup) = watch::channel(Told::default());
    loop {
        let mut buffer = BytesMut::with_capacity(256 << 10);
        tokio::select! {
            read = stdin.read_buf(&mut buffer) => if read? == 0 { break },
            Ok(told) = backup.wait_for(|t| t.ended.is_some()) => {
                return Err(StockError::Ended(told.ended.clone().unwrap_or_default()));
            }
        }
        let mut events = Vec::new();
        parser.feed(buffer.freeze(), &mut events)?;
        for event in events {
            match (event, &mut forward) {
                (SessionEvent::Config(json), None) => {
                    // A stock primary has no generations: the time orders its sessions.
                    let seconds =
                        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(1, |d| d.as_secs());
                    let key = SessionKey { generation: Generation(seconds), nonce: Nonce::random() };
                    let transport = Transport::Unix(socket.clone());
                    let (link, mut from_link) =
                        PrimaryLink::connect(&transport, key, offer(&json)?, &LinkOptions::for_detection(DETECTION))
                            .await?;
                    link.config(json.into()).await?;
                    let told = told.clone();
                    tokio::spawn(async move {
                        while let Some(event) = from_link.next().await {
                            told.send_modify(|t| t.hear(event));
                        }
                    });
                    forward = Some(Forward { link, epoch: Epoch(0), open: Open::default() });
                }
                (SessionEvent::Item(item), Some(forward)) => forward.item(item).await?,
                (SessionEvent::End, Some(_)) => {
                    return Err(StockError::Ended("this is a plain migration, not xl remus".into()));
                }
                _ => return Err(StockError::Short),
            }
        }
    }
    let Some(forward) = forward else { return Err(StockError::Short) };
    // The end of the input is not yet the end of the link: the last whole epoch has to be there.
    let last = forward.epoch.0.checked_sub(1).map(Epoch);
    let patience = tokio::time::timeout(LAST_ACK, backup.wait_for(|t| t.ended.is_some() || t.acked >= last)).await;
    match patience {
        Ok(Ok(told)) if told.acked >= last => Ok(()),
        Ok(Ok(told)) => Err(StockError::Ended(told.ended.clone().unwrap_or_default())),
        _ => Err(StockError::Ended("the last epoch was not acknowledged".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_offer_comes_from_the_configuration() {
        let json = r#"{"c_info":{"type":"pvh","name":"g","uuid":"bf55a386-eaa2-46b6-9232-baa27911b5e9"},
                       "b_info":{"max_memkb":131072,"max_vcpus":2}}"#;
        let offer = offer(json).unwrap();
        assert_eq!((offer.domain.as_str(), offer.max_memory_kib, offer.vcpus), ("g", 131_072, 2));
        assert_eq!(offer.on_primary_loss, OnPrimaryLoss::Wait);
    }

    #[test]
    fn a_pv_guest_or_a_nameless_one_is_refused() {
        for json in [
            r#"{"c_info":{"name":"g","uuid":"bf55a386-eaa2-46b6-9232-baa27911b5e9"},"b_info":{"max_memkb":1}}"#,
            r#"{"c_info":{"type":"pvh","uuid":"bf55a386-eaa2-46b6-9232-baa27911b5e9"},"b_info":{"max_memkb":1}}"#,
            "[]",
        ] {
            assert!(matches!(offer(json), Err(StockError::Config(_))), "{json}");
        }
    }
}
