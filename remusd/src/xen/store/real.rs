//! The real xenstore: the crate xenstore-rs for reads, writes and watches, libxenstore for what that lacks.

use std::io;

use async_trait::async_trait;
use futures::StreamExt;
use xenstore_rs::tokio::XsTokio;
use xenstore_rs::{AsyncWatch, AsyncXs};

use super::native::NativeStore;
use super::pump::Pump;
use super::{Compared, StoreError, Watch, XenStore};
use crate::ids::DomId;
use crate::xen::owner::{Lost, Owner};

/// The xenstore of this host.
pub struct RealStore {
    client: XsTokio,
    pump: Pump,
    native: Owner<NativeStore>,
}

impl RealStore {
    /// Connects. Its tasks live in the calling runtime.
    ///
    /// # Errors
    /// [`StoreError::Connect`], [`StoreError::Library`].
    pub async fn open() -> Result<Self, StoreError> {
        let client = XsTokio::new().await.map_err(|error| StoreError::Connect { cause: error.to_string() })?;
        let native = Owner::start("xenstore", NativeStore::open, |cause| StoreError::Connect { cause })?;
        Ok(Self { client, pump: Pump::start(), native })
    }

    async fn native<R, F>(&self, call: F) -> Result<R, StoreError>
    where
        R: Send + 'static,
        F: FnOnce(&mut NativeStore) -> Result<R, StoreError> + Send + 'static,
    {
        match self.native.call(call).await {
            Ok(answer) => answer,
            Err(Lost) => Err(StoreError::Gone),
        }
    }
}

fn failed(request: &'static str, path: &str, error: &io::Error) -> StoreError {
    if error.kind() == io::ErrorKind::BrokenPipe {
        return StoreError::Gone;
    }
    StoreError::Request { request, path: path.into(), cause: error.to_string() }
}

#[async_trait]
impl XenStore for RealStore {
    async fn read(&self, path: &str) -> Result<Option<String>, StoreError> {
        match self.client.read(path).await {
            Ok(value) => Ok(Some(value.into())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed("read", path, &error)),
        }
    }

    async fn write(&self, path: &str, value: &str) -> Result<(), StoreError> {
        let written = self.client.write(path, value).await;
        written.map_err(|error| failed("write", path, &error))
    }

    async fn directory(&self, path: &str) -> Result<Vec<String>, StoreError> {
        match self.client.directory(path).await {
            // An empty directory comes as one empty name.
            Ok(names) => Ok(names.into_iter().map(String::from).filter(|name| !name.is_empty()).collect()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            // E2BIG: above 4096 bytes it takes several requests, which the crate does not do.
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                let path = path.to_owned();
                self.native(move |store| store.directory(&path)).await
            }
            Err(error) => Err(failed("directory", path, &error)),
        }
    }

    async fn rm(&self, path: &str) -> Result<(), StoreError> {
        match self.client.rm(path).await {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("rm", path, &error)),
            _ => Ok(()),
        }
    }

    async fn watch(&self, path: &str) -> Result<Watch, StoreError> {
        if let Some(shared) = self.pump.share(path) {
            return Ok(shared);
        }
        // In a task: a caller that is cancelled in between must not leave a watch that nobody drains.
        let client = self.client.clone();
        let wanted = path.to_owned();
        let registered = tokio::spawn(async move {
            let events = client.watch(&wanted).await?;
            io::Result::Ok(events.boxed())
        });
        let events = registered.await.map_err(|_| StoreError::Gone)?.map_err(|error| failed("watch", path, &error))?;
        Ok(self.pump.add(path, events))
    }

    async fn compare_and_write(&self, path: &str, expected: Option<&str>, value: &str) -> Result<Compared, StoreError> {
        let (path, value) = (path.to_owned(), value.to_owned());
        let expected = expected.map(str::to_owned);
        self.native(move |store| store.compare_and_write(&path, expected.as_deref(), &value)).await
    }

    async fn resume_domain(&self, domid: DomId) -> Result<(), StoreError> {
        self.native(move |store| store.resume_domain(domid)).await
    }
}
